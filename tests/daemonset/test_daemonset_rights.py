"""The rights that the manifests give: all that is asked for, and nothing that is not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_harness import AGENT, SYSTEM, Cluster
from kubectl import Kubectl
from manifests import objects, rendered, the
from source_harness import Watched, until
from test_cluster_controlplane import ACCOUNT, API_AUDIENCE, World

from undermesh.agent.control import ControlPlane, ControlPlaneSettings
from undermesh.agent.object_source import open_source
from undermesh.agent.reports import PodReport, Reporter
from undermesh.api.source_option import SourceOption
from undermesh.controlplane.kubernetes.root_bundle import ENTRY, NAME
from undermesh.lab.apiserver.rbac import Attributes, Rbac
from undermesh.lab.apiserver.user import User
from undermesh.proto import report_pb2

Right = tuple[str, str, str, str]
"""Account, verb, resource.group, and the object's name if it is for that one only."""


REPORT_OF_A_LOST_NODE: Right = (ACCOUNT, "delete", "configmaps.", "")
"""Used after five minutes only; tests/kubernetes/test_shared_reports.py does."""


class Record:
    """Every decision of the API server about the accounts of the mesh."""

    def __init__(self) -> None:
        self.denied: set[str] = set()
        self.asked: set[Right] = set()

    def add(self, user: User, wanted: Attributes, allowed: bool) -> None:
        prefix, _, account = user.name.rpartition(f"{SYSTEM}:")
        if not prefix or wanted.path:
            return
        if not allowed:
            self.denied.add(f"{account}: {wanted}")
        for name in {"", wanted.name}:
            self.asked.add((account, wanted.verb, f"{wanted.full_resource}.{wanted.group}", name))


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    seen, decide = Record(), Rbac.allows

    def recorded(self: Rbac, user: User, wanted: Attributes) -> tuple[bool, str]:
        decision = decide(self, user, wanted)
        seen.add(user, wanted, decision[0])
        return decision

    monkeypatch.setattr(Rbac, "allows", recorded)
    yield seen


def granted() -> set[Right]:
    rights = set()
    for binding in objects():
        if "roleRef" not in binding:
            continue
        role = the(binding["roleRef"]["kind"], binding["roleRef"]["name"])
        rights |= {
            (subject["name"], verb, f"{resource}.{group}", name)
            for subject in binding["subjects"]
            for rule in role["rules"]
            for verb in rule["verbs"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for name in rule.get("resourceNames", [""])
        }
    return rights


async def _report(port: int, directory: Path) -> None:
    """Report twice as the agent of node-a, whose root and token the world left in the directory."""
    settings = ControlPlaneSettings(f"127.0.0.1:{port}", directory / "root.pem", directory / "token")
    control = ControlPlane(settings)
    reporter = Reporter(control, node="node-a")
    running = asyncio.create_task(reporter.run())
    async with asyncio.timeout(10):
        await reporter.wait_published(reporter.update([PodReport("uid", report_pb2.SENDS_TUNNELS)]))
        await reporter.wait_published(reporter.update([]))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await control.close()


async def test_every_right_is_used_and_none_is_missing(
    kubectl: Kubectl, empty_cluster: Cluster, record: Record, tmp_path: Path
) -> None:
    cluster = empty_cluster
    await kubectl("apply", "-f", "-", stdin=rendered())
    await cluster.account("default", "default")
    await cluster.pod("default", "app", "10.0.0.1")
    token = await cluster.token(SYSTEM, ACCOUNT, audience=API_AUDIENCE)
    world = World(cluster, cluster.kubeconfig_with("controlplane", token))
    agent = cluster.kubeconfig_with("agent", await cluster.token(SYSTEM, AGENT, audience=API_AUDIENCE))
    agent_token = await cluster.token(SYSTEM, AGENT, pod=await cluster.agent_pod())
    watched = Watched(open_source(SourceOption("kubernetes", agent), "node-a", tmp_path / "run"))
    assert {pod.metadata.name for pod in (await watched.start()).pods_on("node-a")} == {"agent-node-a", "app"}
    for kind, plural in (
        ("AuthorizationPolicy", "authorizationpolicies"),
        ("PeerAuthentication", "peerauthentications"),
    ):
        path = f"/apis/security.istio.io/v1/namespaces/default/{plural}"
        await cluster.create(path, {"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": {"name": "all"}})
    async with world.replica() as port:
        await world.certificate(port, agent_token, "spiffe://cluster.local/ns/default/sa/default")
        root = world.root("default")
        await cluster.patch(f"/api/v1/namespaces/default/configmaps/{NAME}", {"data": {ENTRY: "damaged"}})
        await until(lambda: world.root("default") == root)
        await _report(port, tmp_path)
        rights = granted()
        await asyncio.sleep(1)
    await watched.stop()
    assert rights - record.asked == {REPORT_OF_A_LOST_NODE}
    assert record.denied == set()
    assert all("*" not in right[1:3] and "secrets" not in right[2] for right in rights if right[0] == AGENT)
