"""Parts of the mesh and of the cluster that die, are replaced, or are away."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from undermesh.lab.checker.events.registry import HOLD, event
from undermesh.lab.checker.incidents import Incident
from undermesh.lab.errors import LabError
from undermesh.lab.kube import mesh
from undermesh.lab.kube.components import API_SERVER
from undermesh.lab.mesh import wait_for

if TYPE_CHECKING:
    from undermesh.lab.checker.kubeground import KubeGround

HAND_OVERS = 10
_DRAINED = 20.0
_ROLLOUT = 150.0
_AT_ONCE = ("--grace-period=0", "--force")
_CONTROL_PLANE = "app.kubernetes.io/name=undermesh"


@event("ztunnel-kill", "a node's ztunnel is killed, another node's each time")
def _ztunnel_kill(ground: KubeGround) -> Incident:
    node = ground.next_node()
    ztunnel = ground.supervised(node, "ztunnel")
    began = time.monotonic()
    ztunnel.kill_child()
    struck = time.monotonic()
    ground.agents.wait_ready(node)
    return Incident("ztunnel-kill", began, time.monotonic(), node=node, struck=struck)


def _no_hand_over(ground: KubeGround) -> str:
    if all("draining" in ground.agents.get(node, "/v1/status")["ztunnel"] for node in ground.nodes):
        return ""
    return "this version's ztunnel has no hand-over"


@event(
    "ztunnel-hand-over",
    f"ztunnels hand over to successors, {HAND_OVERS} in a row on nodes in turn",
    lacks=_no_hand_over,
)
def _ztunnel_hand_over(ground: KubeGround) -> Incident:
    began = time.monotonic()
    for _ in range(HAND_OVERS):
        node = ground.next_node()
        answer = ground.agents.post(node, "/v1/ztunnel/hand-over", 30.0)
        if "error" in answer:
            raise LabError(f"hand-over on {node}: {answer['error']}")
    ground.wait_mesh()

    def drained() -> None:
        wait_for("end of ztunnels that drain", _DRAINED, lambda: _all_drained(ground))

    ground.at_the_end(drained)
    return Incident("ztunnel-hand-over", began, time.monotonic())


def _all_drained(ground: KubeGround) -> bool:
    return not any(ground.agents.get(node, "/v1/status")["ztunnel"]["draining"] for node in ground.nodes)


@event("agent-kill", "a node's agent is killed, another node's each time")
def _agent_kill(ground: KubeGround) -> Incident:
    node = ground.next_node()
    agent = ground.supervised(node, "agent")
    began = time.monotonic()
    agent.kill_child()
    ground.agents.wait_ready(node)
    return Incident("agent-kill", began, time.monotonic(), node=node)


@event("agent-pod", "a node's pod of the DaemonSet is deleted, another node's each time")
def _agent_pod(ground: KubeGround) -> Incident:
    node = ground.next_node()
    name = mesh.node_pod(ground.cluster.kubectl, node)["metadata"]["name"]
    began = time.monotonic()
    ground.delete("pod", name, mesh.NAMESPACE)
    struck = time.monotonic()
    _rolled_out(ground, "daemonset/undermesh-node")
    ground.agents.wait_ready(node)
    return Incident("agent-pod", began, time.monotonic(), node=node, struck=struck)


@event("rollout", "kubectl rollout restart of the DaemonSet: one node after the other")
def _rollout(ground: KubeGround) -> Incident:
    began = time.monotonic()
    ground.cluster.kubectl("rollout", "restart", "-n", mesh.NAMESPACE, "daemonset/undermesh-node")
    _rolled_out(ground, "daemonset/undermesh-node")
    struck = time.monotonic()
    ground.wait_mesh()
    return Incident("rollout", began, time.monotonic(), struck=struck)


@event("control-plane-one", "one replica of the control plane is killed")
def _control_plane_one(ground: KubeGround) -> Incident:
    began = time.monotonic()
    names = ground.cluster.kubectl("get", "pods", "-n", mesh.NAMESPACE, "-l", _CONTROL_PLANE, "-o", "name").split()
    ground.cluster.kubectl("delete", names[0], "-n", mesh.NAMESPACE, *_AT_ONCE)
    _rolled_out(ground, "deployment/undermesh")
    ground.wait_mesh()
    return Incident("control-plane-one", began, time.monotonic())


@event("control-plane-all", "all replicas of the control plane are killed at once")
def _control_plane_all(ground: KubeGround) -> Incident:
    began = time.monotonic()
    ground.cluster.kubectl("delete", "pods", "-n", mesh.NAMESPACE, "-l", _CONTROL_PLANE, *_AT_ONCE)
    _rolled_out(ground, "deployment/undermesh")
    ground.wait_mesh()
    return Incident("control-plane-all", began, time.monotonic())


@event("api-away", "the API server is killed and comes back", needs_mesh=False)
def _api_away(ground: KubeGround) -> Incident:
    began = time.monotonic()
    ground.cluster.kill(API_SERVER)
    time.sleep(HOLD)
    ground.cluster.restart(API_SERVER)
    wait_for("nodes being Ready", 30.0, lambda: all(ground.cluster.api.nodes().values()))
    return Incident("api-away", began, time.monotonic())


def _rolled_out(ground: KubeGround, what: str) -> None:
    wait = ("rollout", "status", "-n", mesh.NAMESPACE, what, f"--timeout={_ROLLOUT:.0f}s")
    ground.cluster.kubectl(*wait, seconds=_ROLLOUT + 5)
