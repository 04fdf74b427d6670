"""A ground on which something is wrong: a relay between client and server, or claims that are not true."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from checker_relay import OFFSET

from undermesh.lab import netns
from undermesh.lab.checker.ground import PodInfo, ServiceInfo, Sight, SocketLink
from undermesh.lab.checker.incidents import Incident
from undermesh.lab.checker.kubeground import KubeGround
from undermesh.lab.checker.shapes import PORTS, Mode
from undermesh.lab.kube import inside
from undermesh.lab.mesh import wait_for

RELAY = Path(__file__).with_name("checker_relay.py")
SERVED = [port for mode, port in PORTS.items() if mode is not Mode.REFUSED]

_TABLE = "um_relay"


class FaultyGround:
    """Some pods of a ground; `close` ends every process that was started.

    Args:
        names: the pods.
        claims: namespaces that are said to be in the mesh.
        events: what is said to happen, by name.
    """

    flipping = "check-flip"

    def __init__(
        self,
        ground: KubeGround,
        names: tuple[str, ...] = ("plain1", "plain2"),
        claims: frozenset[str] = frozenset(),
        events: Mapping[str, Callable[[], Incident]] | None = None,
    ) -> None:
        self._ground = ground
        self._incidents = dict(events or {})
        self._processes: list[subprocess.Popen[bytes]] = []
        self.pods = [pod for name in names for pod in ground.pods if pod.name == name]
        self.services: list[ServiceInfo] = []
        self.enrolled = claims

    @property
    def events(self) -> Mapping[str, str]:
        return dict.fromkeys(self._incidents, "whatever")

    def mortal(self, event: str) -> frozenset[str]:
        return frozenset()

    def leaving(self, event: str) -> frozenset[str]:
        return frozenset()

    def peer(self, pod: PodInfo) -> SocketLink:
        return self._ground.peer(pod)

    def watch(self, token: str) -> Sight:
        return self._ground.watch(token)

    def records(self, node: str) -> list[dict[str, Any]]:
        return self._ground.records(node)

    def cause(self, event: str) -> Incident:
        return self._incidents[event]()

    def finish(self) -> list[str]:
        return []

    def put_relays(self, *faults: str) -> None:
        """A service per fault: connections to it from the first pod to the second go through a relay that has it."""
        client, server = self.pods
        relays = []
        for number, fault in enumerate(faults, 1):
            addresses = (f"10.9.9.{number}", f"fd00:9::{number}")
            self.services.append(ServiceInfo(fault, addresses, (server,)))
            for family, address in zip((4, 6), addresses, strict=True):
                self.run_in(client, ["ip", "addr", "replace", address, "dev", "lo"])
                hosts = [address, server.address(family), client.address(family)]
                relays += [[fault, *hosts, port] for port in SERVED]
        self.run_in(client, ["nft", _redirect(relays)])
        self.spawn(client, [str(RELAY), json.dumps(relays)])
        name, ports = self.netns(client), {port + OFFSET for port in SERVED}
        wait_for("relays", 5.0, lambda: sum(port in ports for _, port in netns.listeners(name).values()) == len(relays))

    def netns(self, pod: PodInfo) -> str:
        """The path of a pod's network namespace."""
        return inside.pod_netns(self._ground.node(pod.node), self._ground.uids[pod.name])

    def run_in(self, pod: PodInfo, argv: list[str]) -> None:
        """Run something that must succeed in a pod's network namespace."""
        subprocess.run(netns.enter(self.netns(pod), argv), check=True, capture_output=True)

    def spawn(self, pod: PodInfo, argv: list[str]) -> None:
        """Start a Python program in a pod's network namespace."""
        command = netns.enter(self.netns(pod), [sys.executable, "-I", "-S", *argv])
        self._processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def stop(self) -> None:
        """End every process."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()

    def close(self) -> None:
        """End every process, and take the redirection away."""
        self.stop()
        subprocess.run(
            netns.enter(self.netns(self.pods[0]), ["nft", f"delete table inet {_TABLE}"]),
            check=False,
            capture_output=True,
        )


def said(incident: Incident) -> Callable[[], Incident]:
    """An event that does nothing but last: the incident's end is its duration."""

    def cause() -> Incident:
        now = time.monotonic()
        time.sleep(incident.ended)
        ended = now + incident.ended
        return Incident(
            incident.event,
            now,
            ended,
            namespace=incident.namespace,
            account=incident.account,
            governs=now,
            lifted=ended,
        )

    return cause


def _redirect(relays: list[list[Any]]) -> str:
    """The peer has the ports themselves: what is dialled gets to where the relays listen."""
    rules = ""
    for _, address, _, _, port in relays:
        family, target = ("ip6", f"[{address}]") if ":" in address else ("ip", address)
        rules += f"{family} daddr {address} tcp dport {port} dnat {family} to {target}:{port + OFFSET}\n"
    return f"table inet {_TABLE} {{\nchain out {{\ntype nat hook output priority -100;\n{rules}}}\n}}\n"
