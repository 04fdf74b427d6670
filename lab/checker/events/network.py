"""Trouble on the network between the nodes: packets of pods that are lost, late, out of order, or too big."""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from undermesh.lab.checker.events.registry import HOLD, event
from undermesh.lab.checker.incidents import Incident
from undermesh.lab.checker.packetqueue import PacketQueue

if TYPE_CHECKING:
    from undermesh.lab.checker.kubeground import KubeGround

_TABLE = "um_checker"
_WIRE = "eth0"
_QUEUE = 7
_IPTABLES = ("iptables", "ip6tables")


@event("loss", "30 % of the pods' packets between the nodes are lost", needs_mesh=False)
def _loss(ground: KubeGround) -> Incident:
    return _dropping(ground, "loss", "numgen random mod 100 < 30 drop")


@event("partition", "no packet of a pod gets from node to node", needs_mesh=False)
def _partition(ground: KubeGround) -> Incident:
    return _dropping(ground, "partition", "drop")


@event("mtu", "the link between the nodes carries smaller packets", needs_mesh=False)
def _mtu(ground: KubeGround) -> Incident:
    began = time.monotonic()
    try:
        _on_nodes(ground, ["ip", "link", "set", _WIRE, "mtu", "1300"])
        time.sleep(HOLD)
    finally:
        _on_nodes(ground, ["ip", "link", "set", _WIRE, "mtu", "1500"])
    return Incident("mtu", began, time.monotonic())


def _no_queue(_: KubeGround) -> str:
    missing = [program for program in _IPTABLES if shutil.which(program) is None]
    return f"{', '.join(missing)} not installed: packets are held by its target NFQUEUE" if missing else ""


@event("delay", "pods' packets between the nodes take 50 ms, give or take 20", needs_mesh=False, lacks=_no_queue)
def _delay(ground: KubeGround) -> Incident:
    return _holding(ground, "delay", lambda: random.uniform(0.03, 0.07))


@event(
    "reorder", "a quarter of the pods' packets between the nodes overtake the others", needs_mesh=False, lacks=_no_queue
)
def _reorder(ground: KubeGround) -> Incident:
    return _holding(ground, "reorder", lambda: 0.01 if random.random() < 0.75 else 0.0)


def _dropping(ground: KubeGround, name: str, verdict: str) -> Incident:
    rules = "".join(f'oifname "{_WIRE}" {tcp} {verdict}\n' for tcp in ("ip protocol tcp", "ip6 nexthdr tcp"))
    table = f"table inet {_TABLE} {{\nchain trouble {{\ntype filter hook forward priority filter;\n{rules}}}\n}}\n"
    began = time.monotonic()
    _on_nodes(ground, ["nft", table])
    try:
        time.sleep(HOLD)
    finally:
        _on_nodes(ground, ["nft", f"delete table inet {_TABLE}"])
    return Incident(name, began, time.monotonic())


def _holding(ground: KubeGround, name: str, delay: Callable[[], float]) -> Incident:
    with contextlib.ExitStack() as stack:
        for node in ground.nodes:
            queue = stack.enter_context(PacketQueue(ground.node(node).netns, _QUEUE, delay))
            stack.enter_context(_queued(ground, node))
            stack.callback(queue.check)
        began = time.monotonic()
        time.sleep(HOLD)
    return Incident(name, began, time.monotonic())


@contextlib.contextmanager
def _queued(ground: KubeGround, node: str) -> Iterator[None]:
    """Pods' packets to other nodes go through the queue; with nobody at it they pass."""
    rule = ["FORWARD", "-o", _WIRE, "-p", "tcp", "-j", "NFQUEUE", "--queue-num", str(_QUEUE), "--queue-bypass"]
    with contextlib.ExitStack() as stack:
        for program in _IPTABLES:
            ground.run_on(node, [program, "-w", "-I", *rule])
            stack.callback(ground.run_on, node, [program, "-w", "-D", *rule])
        yield


def _on_nodes(ground: KubeGround, argv: list[str]) -> None:
    for node in ground.nodes:
        ground.run_on(node, argv)
