"""The agent's choice of source."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted_server import NAMESPACES, PODS, Server, namespace, pod
from source_harness import Watched

from undermesh.agent.object_source import open_source
from undermesh.api.files import FileSource
from undermesh.api.kubernetes.source import KubernetesSource
from undermesh.api.problems import InputError
from undermesh.api.source_option import source_option


async def test_the_agent_reads_its_node_s_pods_and_the_namespaces_from_the_api_server(
    server: Server, tmp_path: Path
) -> None:
    await server.put(NAMESPACES, namespace("shop", istio_io="x"))
    await server.put(PODS, pod("mine"))
    await server.put(PODS, pod("other", node="node-b", ip="10.0.0.2"))
    source = open_source(source_option(f"kubernetes:{server.kubeconfig(tmp_path)}"), "node-a")
    assert isinstance(source, KubernetesSource)
    watched = Watched(source)
    first = await watched.start()
    assert [p.metadata.name for p in first.pods_on("node-a")] == ["mine"] and len(first.pods) == 1
    await watched.stop()


@pytest.mark.parametrize("prefix", ["", "files:"])
def test_the_agent_reads_files_from_a_directory(tmp_path: Path, prefix: str) -> None:
    assert isinstance(open_source(source_option(f"{prefix}{tmp_path}"), "node-a"), FileSource)


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
        open_source(source_option(f"kubernetes:{path}"), "node-a")


def test_a_pod_without_its_token_is_told_to_mount_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(InputError, match="automountServiceAccountToken"):
        open_source(source_option("kubernetes"), "node-a")
