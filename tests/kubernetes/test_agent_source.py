"""The agent's choice of source."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted_server import NAMESPACES, PODS, Server, namespace, pod, status
from source_harness import FAST, Watched, until

from undermesh.agent.kept_source import KeptSource
from undermesh.agent.object_source import open_source
from undermesh.api.files import FileSource
from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.api import Api
from undermesh.api.kubernetes.resources import for_agent
from undermesh.api.kubernetes.source import KubernetesSource
from undermesh.api.problems import InputError
from undermesh.api.source_option import source_option


async def test_the_agent_reads_its_node_s_pods_and_the_namespaces_from_the_api_server(
    server: Server, tmp_path: Path
) -> None:
    await server.put(NAMESPACES, namespace("shop", istio_io="x"))
    await server.put(PODS, pod("mine"))
    await server.put(PODS, pod("other", node="node-b", ip="10.0.0.2"))
    source = open_source(source_option(f"kubernetes:{server.kubeconfig(tmp_path)}"), "node-a", tmp_path / "run")
    watched = Watched(source)
    first = await watched.start()
    assert [p.metadata.name for p in first.pods_on("node-a")] == ["mine"] and len(first.pods) == 1
    await watched.stop()


@pytest.mark.parametrize("prefix", ["", "files:"])
def test_the_agent_reads_files_from_a_directory(tmp_path: Path, prefix: str) -> None:
    assert isinstance(open_source(source_option(f"{prefix}{tmp_path}"), "node-a", tmp_path), FileSource)


BROKEN = {
    "no YAML": "{",
    "no kubeconfig": "[]",
    "empty": "",
    "no such context": "{apiVersion: v1, kind: Config, current-context: x, contexts: [], clusters: [], users: []}",
    "no server": (
        "{current-context: x, contexts: [{name: x, context: {cluster: c, user: u}}],"
        " clusters: [{name: c, cluster: {}}], users: [{name: u, user: {}}]}"
    ),
    "no such CA file": (
        "{current-context: x, contexts: [{name: x, context: {cluster: c, user: u}}],"
        " clusters: [{name: c, cluster: {server: 'https://h', certificate-authority: /nonexistent}}],"
        " users: [{name: u, user: {}}]}"
    ),
    "a CA that is none": (
        "{current-context: x, contexts: [{name: x, context: {cluster: c, user: u}}],"
        " clusters: [{name: c, cluster: {server: 'https://h', certificate-authority-data: AAAA}}],"
        " users: [{name: u, user: {}}]}"
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_kubeconfig_that_cannot_be_used_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(BROKEN[name])
    with pytest.raises(InputError, match=r"kubeconfig: no usable credentials \(.+\): correct the kubeconfig"):
        open_source(source_option(f"kubernetes:{path}"), "node-a", tmp_path)


def test_a_pod_without_its_token_is_told_to_mount_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(InputError, match="automountServiceAccountToken"):
        open_source(source_option("kubernetes"), "node-a", tmp_path)


def kept(server: Server, directory: Path, node: str = "node-a") -> Watched:
    source = KubernetesSource(Api(Access(server.kubeconfig(directory)), FAST), for_agent(node))
    return Watched(KeptSource(source, directory / "objects.json", node, patience=0.2))


async def filled(server: Server, directory: Path) -> Watched:
    """An agent has seen a state and has gone; the server refuses from now on."""
    await server.put(NAMESPACES, namespace("shop", istio_io="x"))
    rich = pod("web", labels={"app": "web"}, annotations={"a": "b"}, ownerReferences=[{"kind": "Job", "name": "j"}])
    rich["spec"]["containers"] = [{"name": "c", "livenessProbe": {"tcpSocket": {"port": 80}}}]
    await server.put(PODS, rich)
    before = kept(server, directory)
    await before.start()
    await before.stop()
    server.fail("list", PODS, *[status(503, "ServiceUnavailable")] * 8)
    return before


async def test_an_agent_that_starts_while_the_server_is_away_has_the_last_state(server: Server, tmp_path: Path) -> None:
    before = await filled(server, tmp_path)
    after = kept(server, tmp_path)
    assert await after.start() == before.states[-1] == after.source.current
    assert "is in force until the source answers" in after.errors
    await until(lambda: after.source.errors == ())
    await server.put(PODS, pod("new", ip="10.0.0.2"))
    await after.pods_are("new", "web")
    assert len(after.states) == 2
    await after.stop()


async def test_a_server_that_answers_is_asked_before_the_kept_state_is_used(server: Server, tmp_path: Path) -> None:
    await filled(server, tmp_path)
    server.faults.clear()
    await server.delete(PODS, "shop", "web")
    after = kept(server, tmp_path)
    assert not (await after.start()).pods and after.source.errors == ()
    await after.stop()


@pytest.mark.parametrize("fault", ["missing", "broken", "of another node"])
async def test_without_a_usable_kept_state_nothing_is_yielded_before_the_server_s(
    server: Server, tmp_path: Path, fault: str
) -> None:
    await filled(server, tmp_path)
    file = tmp_path / "objects.json"
    match fault:
        case "missing":
            file.unlink()
        case "broken":
            file.write_text(file.read_text()[:-20])
        case _:
            file.write_text(file.read_text().replace('"node":"node-a"', '"node":"node-b"'))
    after = kept(server, tmp_path)
    await server.delete(PODS, "shop", "web")
    assert not (await after.start()).pods
    await after.stop()
