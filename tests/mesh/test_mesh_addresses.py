"""Every sort of address and service, dialled from inside and outside of the mesh: the right pod answers as in the
control, by tunnel where both ends are enrolled, and not at all where a policy wants an identity and there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from mesh_world import (
    ADMIN,
    HOST_PORT,
    HTTP,
    LOCAL_NODE_PORT,
    MESH,
    NODE_PORT,
    NODES,
    WEB,
    Holder,
    World,
    pod,
    service,
)

from undermesh.lab.kube import inside
from undermesh.lab.kube.cluster import KubeCluster
from undermesh.lab.mesh import wait_for

pytestmark = pytest.mark.root

SOON = 2.0
"""Seconds in which a refusal must have come."""
KNOWN = 2.0
"""Seconds in which a client's node must know that a pod ends."""
DRAIN = 8
"""Seconds that a pod takes to end."""
FROM_PODS = ("client", "pclient", "host-1")
FROM_ALL = (*FROM_PODS, "outside")
NEEDS_IDENTITY = {
    "apiVersion": "security.istio.io/v1",
    "kind": "AuthorizationPolicy",
    "metadata": {"name": "identity", "namespace": MESH},
    "spec": {"action": "DENY", "rules": [{"from": [{"source": {"notPrincipals": ["*"]}}]}]},
}


@dataclass(frozen=True)
class Row:
    """One address to dial."""

    target: Callable[[World, int], tuple[str, int]]
    answers: tuple[str, ...]
    """Who may answer, in turns; empty: nobody."""
    lane: str = "hbone"
    """How the enrolled client's connection goes: hbone, plain, or own: it stays in the pod."""
    clients: tuple[str, ...] = FROM_PODS
    families: tuple[int, ...] = (4, 6)
    guarded: bool = True
    """Whether a pod in the mesh answers, so that its policy governs."""


def by_service(name: str, port: int = 80) -> Callable[[World, int], tuple[str, int]]:
    return lambda world, family: (world.service(name, family), port)


def by_pod(name: str, port: int = HTTP) -> Callable[[World, int], tuple[str, int]]:
    return lambda world, family: (world.address(name, family), port)


def by_node(name: str, port: int) -> Callable[[World, int], tuple[str, int]]:
    return lambda world, family: (world.node(name, family), port)


def mapped(target: Callable[[World, int], tuple[str, int]]) -> Callable[[World, int], tuple[str, int]]:
    """From a socket of IPv6 that dials ::ffff:1.2.3.4, as Java's do."""

    def map_it(world: World, family: int) -> tuple[str, int]:
        host, port = target(world, family)
        return f"::ffff:{host}", port

    return map_it


def outside_of_the_mesh(*answers: str, **more: Any) -> dict[str, Any]:
    return {"answers": answers, "lane": "plain", "guarded": False, **more}


ROWS = {
    "service": Row(by_service("web"), WEB),
    "service from an IPv4-mapped socket": Row(mapped(by_service("web")), WEB, families=(4,)),
    "service of IPv4 alone": Row(by_service("web4"), WEB, families=(4,)),
    "service of IPv6 alone": Row(by_service("web6"), WEB, families=(6,)),
    "pod on another node": Row(by_pod("web-b"), ("web-b",)),
    "pod on the same node": Row(by_pod("web-a"), ("web-a",)),
    "pod from an IPv4-mapped socket": Row(mapped(by_pod("web-b")), ("web-b",), families=(4,)),
    "port of a pod that no service has": Row(by_pod("web-b", ADMIN), ("web-b",)),
    "named port that one of the pods has": Row(by_service("admin"), ("web-a",)),
    "slice with this port alone": Row(by_service("parts", 80), ("web-a",)),
    "slice with the other port alone": Row(by_service("parts", 81), ("web-b",)),
    "service of itself": Row(by_service("itself"), ("client",), lane="own"),
    "service without ready pods": Row(by_service("unready"), (), lane="plain"),
    "service that publishes unready pods": Row(by_service("early"), ("unready",)),
    "unready pod": Row(by_pod("unready"), ("unready",)),
    "headless service by name": Row(
        lambda *_: (f"headless.{MESH}.svc.cluster.local", HTTP), WEB, clients=("client", "pclient"), families=(6,)
    ),
    # CAP-01: a service that aims at the mesh's own port reaches no app and runs in no circle.
    "service towards port 15008": Row(by_service("tunnelport"), (), lane="plain", clients=("client",)),
    "pod that is not enrolled": Row(by_pod("pweb"), **outside_of_the_mesh("pweb")),
    "service of a pod that is not enrolled": Row(by_service("plain"), **outside_of_the_mesh("pweb")),
    **{
        f"host network's port {9000 + number} {how}": Row(
            target, **outside_of_the_mesh(f"host-{number}", clients=which)
        )
        for number in (1, 2, 3)
        for how, target, which in (
            ("by node", by_node("node2", 9000 + number), FROM_ALL),
            ("by service", by_service(f"host-{number}"), FROM_PODS),
        )
    },
    **{f"NodePort of {node}": Row(by_node(node, NODE_PORT), WEB, lane="plain", clients=FROM_ALL) for node in NODES},
    "local NodePort": Row(by_node("node1", LOCAL_NODE_PORT), ("client",), lane="plain", clients=("outside",)),
    "hostPort": Row(by_node("node2", HOST_PORT), ("web-b",), lane="plain", clients=FROM_ALL),
    "hostPort of a node without it": Row(by_node("node1", HOST_PORT), (), lane="plain", clients=FROM_ALL),
}


@pytest.fixture(scope="module")
def world(meshed_cluster: KubeCluster) -> Iterator[World]:
    made = World.build(meshed_cluster)
    yield made
    made.remove()


@pytest.fixture
def identity_demanded(world: World) -> Iterator[None]:
    """No pod of the mesh lets anybody in who shows no identity."""
    world.apply(NEEDS_IDENTITY)

    def known() -> bool:
        return all(f"{MESH}/identity" in [policy["name"] for policy in policies_of(world, node)] for node in NODES)

    wait_for("the policy on both nodes", 10, known)
    yield
    world.cluster.kubectl("delete", "authorizationpolicy", "identity", "-n", MESH)


def policies_of(world: World, node: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = inside.agents_of(world.cluster.layout).get(node, "/v1/policies")["policies"]
    return found


Outcomes = list[tuple[str, Row, dict[str, Any]]]


def outcomes(world: World, client: str) -> Outcomes:
    """(name, row, what came of it) of each row that the client dials, all at about the same time."""
    chosen = {
        f"{name}, v{family}": (row, family)
        for name, row in ROWS.items()
        for family in row.families
        if client in row.clients
    }
    found = world.dial(client, {name: row.target(world, family) for name, (row, family) in chosen.items()})
    return [(name, row, found[name]) for name, (row, _) in chosen.items()]


@pytest.fixture(scope="module")
def unguarded(world: World) -> Callable[[str], Outcomes]:
    """unguarded(client): its outcomes with no policy, dialled once."""
    return functools.cache(functools.partial(outcomes, world))


@pytest.mark.parametrize("client", FROM_ALL)
def test_the_right_pod_answers(unguarded: Callable[[str], Outcomes], subtests: Any, client: str) -> None:
    for name, row, found in unguarded(client):
        with subtests.test(name):
            assert_answered(found, row.answers)


def test_an_enrolled_pod_uses_tunnels_and_its_log_knows_both_ends(world: World, subtests: Any) -> None:
    world.mark()
    dialled = [(name, row, found) for name, row, found in outcomes(world, "client") if found["local"]]
    records = {}

    def logged() -> bool:
        records.update({entry["src.addr"]: entry for entry in world.records("node1", "outbound")})
        return len(records) >= len(dialled)

    wait_for("records of all connections", 5, logged)
    for name, row, found in dialled:
        host, port = found["local"]
        entry = records[f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
        with subtests.test(name):
            assert entry["lane"] == ("hbone" if row.lane == "hbone" else "plain"), entry
            assert ("error" in entry) == (not row.answers), entry
            if row.lane == "hbone":
                identity = f"spiffe://cluster.local/ns/{MESH}/sa/default"
                assert (entry["src.identity"], entry["dst.identity"]) == (identity, identity)
            if row.lane == "hbone" or " by service" in name:
                assert entry["dst.workload"] == found["answer"]["pod"], "logged as another one"


@pytest.mark.parametrize("client", FROM_ALL)
@pytest.mark.usefixtures("identity_demanded")
def test_who_shows_no_identity_is_refused_where_one_is_demanded(world: World, subtests: Any, client: str) -> None:
    """NodePorts, hostPorts and the host's network lend nobody an identity, and a tunnel is the only way that does."""
    for name, row, found in outcomes(world, client):
        admitted = not row.guarded or (client == "client" and row.lane != "plain")
        with subtests.test(name):
            assert_answered(found, row.answers if admitted else ())


def assert_answered(found: dict[str, Any], answers: tuple[str, ...]) -> None:
    if answers:
        assert found["error"] is None, found
        assert found["answer"]["pod"] in answers, found
    else:
        assert found["answer"] is None and found["error"], found
        assert found["seconds"] < SOON, found


def test_clients_keep_their_addresses(unguarded: Callable[[str], Outcomes], subtests: Any) -> None:
    """As in the control: all but those whom a node masquerades."""
    for client in ("client", "pclient"):
        for name, row, found in unguarded(client):
            if found["answer"] and not name.startswith("NodePort"):
                with subtests.test(f"{client}: {name}"):
                    assert found["answer"]["peer"] == found["local"][0], row
    for name, _, found in unguarded("outside"):
        if name.startswith(("local NodePort,", "hostPort,")):
            with subtests.test(f"outside: {name}"):
                assert found["answer"]["peer"] == found["local"][0]


def test_pods_of_the_hosts_network_are_not_enrolled_and_it_is_said_why(world: World) -> None:
    pods = inside.agents_of(world.cluster.layout).get("node2", "/v1/status")["pods"]
    said = {pod["name"]: (pod["state"], pod["reason"]) for pod in pods if pod["name"].startswith("host-")}
    assert len(said) == 3
    assert all(state == "plain" and "hostNetwork" in reason for state, reason in said.values()), said


QUESTIONS = """
import json, socket, struct
server = [line.split()[1] for line in open("/etc/resolv.conf") if line.startswith("nameserver")][0]
def ask(name, kind, tcp, opcode=0):
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    query = struct.pack(">HHHHHH", 7, 0x0100 | opcode << 11, 1, 0, 0, 0) + labels + b"\\0" + struct.pack(">HH", kind, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as asking:
        asking.settimeout(3)
        asking.connect((server, 53))
        if not tcp:
            asking.send(query)
            answer = asking.recv(4096)
        else:
            asking.sendall(struct.pack(">H", len(query)) + query)
            with asking.makefile("rb") as stream:
                answer = stream.read(struct.unpack(">H", stream.read(2))[0])
    # Answers of several records come in any order.
    return [answer[3] & 15, struct.unpack(">H", answer[6:8])[0], sorted(answer[12:])]
names = [f"{name}.MESH.svc.cluster.local" for name in ("web", "headless", "unready", "early", "alias", "missing")]
print(json.dumps([ask(name, kind, tcp) for name in names for kind in (1, 28, 33, 16, 12) for tcp in (False, True)]
      + [ask("cluster.local", 6, tcp, opcode=5) for tcp in (False, True)]))
""".replace("MESH", MESH)


def test_names_are_the_same_inside_and_outside_of_the_mesh(world: World) -> None:
    alias = {"type": "ExternalName", "externalName": f"web.{MESH}.svc.cluster.local"}
    meta = {"name": "alias", "namespace": MESH}
    world.apply({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": alias})
    wait_for("the alias", 10, lambda: world.exec("pclient", QUESTIONS)[40][:2] == [0, 2])
    inner, outer = world.exec("client", QUESTIONS), world.exec("pclient", QUESTIONS)
    assert inner == outer
    assert {code for code, _, _ in inner} == {0, 3, 4}, "some exist, some do not, and an UPDATE is not for this server"


# === pods that end ===


@pytest.fixture(scope="module")
def pair(world: World) -> Iterator[World]:
    """Two pods of a service that drain for a while when they are told to end."""
    names = {"drain-a": "node1", "drain-b": "node2"}
    world.apply(*(pod(name, node, app="drain", grace=DRAIN) for name, node in names.items()), service("drain", "drain"))
    world.wait_enrolled(*names)
    yield world


def test_a_terminating_pod_keeps_what_is_open_and_gets_nothing_new(pair: World) -> None:
    targets = {str(number): (pair.service("drain", 4 + 2 * (number % 2)), 80) for number in range(12)}

    def answering() -> set[str]:
        found = pair.dial("client", targets).values()
        return {one["answer"]["pod"] if one["answer"] else one["error"] for one in found}

    wait_for("both pods behind the service", 10, lambda: answering() == {"drain-a", "drain-b"})
    with Holder(pair, "client", {name: (pair.address(name, 4), HTTP) for name in ("drain-a", "drain-b")}) as held:
        pair.delete("drain-b")
        wait_for("new connections to go elsewhere", KNOWN, lambda: answering() == {"drain-a"})
        assert all(answering() == {"drain-a"} for _ in range(3))
        assert held.alive() == {"drain-a", "drain-b"}
        pair.delete("drain-a")
        # docs/decisions/0011: kube-proxy would go on using pods of which none is left that does not end.
        wait_for("refusals", KNOWN, lambda: answering() == {"ConnectionResetError"})
        assert held.alive() == {"drain-a", "drain-b"}
        wait_for("the end of both", DRAIN + 10, lambda: not held.alive())
    assert set(held.ends.values()) <= {"ConnectionResetError", "BrokenPipeError", "EOF"}, held.ends
