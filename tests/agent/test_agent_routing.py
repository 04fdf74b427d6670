"""The plan of a namespace's rules and routes: from any state to the wanted one, and back to none."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from capture.topology import Netns
from hypothesis import given
from hypothesis import strategies as st

from undermesh.agent import netns, routing
from undermesh.agent.routing import (
    DEVICE_METRIC,
    LO_INDEX,
    LO_METRIC,
    Device,
    FamilyState,
    Route,
    RoutingError,
    Rule,
    Steps,
    plan_absent,
    plan_present,
    wanted_rules,
)
from undermesh.agent.rtnetlink import RouteSocket
from undermesh.gen import marks

KERNELS_RULES = (Rule(0, 0, 255), Rule(32766, 0, 254), Rule(32767, 0, 253))
POD4, POD6 = ipaddress.ip_address("10.0.0.5"), ipaddress.ip_address("fd00::5")
OTHER4 = ipaddress.ip_address("10.9.0.5")


def fresh(family: int = socket.AF_INET) -> FamilyState:
    """A namespace as a CNI leaves it: lo and eth0."""
    address = POD4 if family == socket.AF_INET else POD6
    return FamilyState(
        family=family,
        enabled=True,
        rules=KERNELS_RULES,
        routes=frozenset(),
        devices=(Device(LO_INDEX, "lo", ()), Device(2, "eth0", (address,))),
        used_tables=frozenset({253, 254, 255}),
        table=None,
    )


def after(state: FamilyState, steps: Steps) -> FamilyState:
    """The state once the kernel has taken the steps."""
    rules = [rule for rule in (*state.rules, *steps.add_rules) if rule not in steps.delete_rules]
    routes = state.routes.union(steps.add_routes).difference(steps.delete_routes)
    return replace(
        state, rules=tuple(rules), routes=frozenset(routes), table=routing.our_table(rules) or steps.table or None
    )


def test_a_fresh_namespace_gets_rules_ahead_of_all_and_a_route_for_every_device() -> None:
    steps = plan_present(fresh(), [POD4, POD6])
    assert steps.add_routes == (Route(LO_INDEX, POD4, LO_METRIC), Route(2, POD4, DEVICE_METRIC + 2))
    assert [rule.priority for rule in steps.add_rules] == list(range(1, 9))
    assert steps.delete_rules == (Rule(0, 0, 255),)
    assert steps.table == 1338


def test_routes_come_before_rules_and_the_local_rule_moves_last() -> None:
    """Steps name their order; a rule ahead of its routes would refuse what it should capture."""
    assert [field for field in Steps.__dataclass_fields__ if field != "table"] == [
        "add_routes",
        "add_rules",
        "delete_rules",
        "delete_routes",
    ]


def test_marked_traffic_that_finds_no_route_goes_nowhere() -> None:
    first, barrier, *_ = wanted_rules(1338)
    assert (first.fwmark, barrier.fwmark) == (marks.CAPTURE, marks.CAPTURE)
    assert first.priority + 1 == barrier.priority
    assert barrier.table == 0
    assert barrier.action == 7


@pytest.mark.parametrize(
    ("used", "table"),
    [({254, 255}, 1338), ({1338}, 1339), ({1338, 1339, 1341}, 1340)],
)
def test_a_table_that_nobody_uses_is_chosen(used: set[int], table: int) -> None:
    assert plan_present(replace(fresh(), used_tables=frozenset(used)), [POD4]).table == table


def test_the_remembered_table_is_kept_though_its_rule_is_gone() -> None:
    assert plan_present(replace(fresh(), table=1400), [POD4]).table == 1400


@pytest.mark.parametrize(
    ("devices", "addresses", "sources"),
    [
        pytest.param([("eth0", (POD4,))], [POD4], {2: POD4}, id="own address"),
        pytest.param([("eth0", (POD4,)), ("net1", (OTHER4,))], [POD4], {2: POD4, 3: OTHER4}, id="each its own"),
        pytest.param([("eth0", (POD4,)), ("net1", ())], [POD4], {2: POD4, 3: POD4}, id="lent"),
        pytest.param([("eth0", (OTHER4,))], [], {2: OTHER4}, id="none known yet"),
    ],
)
def test_a_device_route_names_a_source(
    devices: list[tuple[str, tuple[routing.IPAddress, ...]]],
    addresses: list[routing.IPAddress],
    sources: dict[int, routing.IPAddress],
) -> None:
    made = [Device(LO_INDEX, "lo", ())] + [Device(i, name, own) for i, (name, own) in enumerate(devices, 2)]
    steps = plan_present(replace(fresh(), devices=tuple(made)), addresses)
    assert {r.ifindex: r.source for r in steps.add_routes if r.ifindex != LO_INDEX} == sources


def test_without_any_ipv4_address_there_is_no_route_and_the_rules_refuse() -> None:
    state = replace(fresh(), devices=(Device(LO_INDEX, "lo", ()), Device(2, "eth0", ())))
    steps = plan_present(state, [])
    assert steps.add_routes == ()
    assert wanted_rules(1338) == steps.add_rules


def test_a_family_that_is_switched_off_gets_rules_only() -> None:
    steps = plan_present(replace(fresh(socket.AF_INET6), enabled=False), [POD6])
    assert steps.add_routes == ()
    assert wanted_rules(1338) == steps.add_rules


@pytest.mark.parametrize("priority", range(1, 9))
def test_a_foreign_rule_ahead_of_ours_is_refused_with_its_preference(priority: int) -> None:
    state = replace(fresh(), rules=(*KERNELS_RULES, Rule(priority, 0x1, 77)))
    with pytest.raises(RoutingError, match=f"preference {priority}, ahead of 8: move it behind 8"):
        plan_present(state, [POD4])


def test_a_rule_with_other_selectors_never_passes_for_ours() -> None:
    """Such a rule is read with table -1."""
    state = after(fresh(), plan_present(fresh(), [POD4]))
    foreign = tuple(replace(rule, table=-1) if rule.priority == 1 else rule for rule in state.rules)
    with pytest.raises(RoutingError):
        plan_present(replace(state, rules=foreign), [POD4])


# === properties ===

addresses = st.integers(1, 250).map(lambda n: ipaddress.ip_address(f"10.0.0.{n}"))
devices = st.lists(st.lists(addresses, max_size=2, unique=True), min_size=1, max_size=4).map(
    lambda each: (
        Device(LO_INDEX, "lo", ()),
        *(Device(index, f"net{index}", tuple(own)) for index, own in enumerate(each, 2)),
    )
)
foreign_rules = st.lists(st.integers(9, 40000).map(lambda p: Rule(p, 0, 500)), max_size=3, unique=True)


@given(devices=devices, pod=st.lists(addresses, max_size=2, unique=True), foreign=foreign_rules, data=st.data())
def test_whatever_of_ours_is_missing_one_plan_brings_it_back(
    devices: tuple[Device, ...], pod: list[routing.IPAddress], foreign: list[Rule], data: st.DataObject
) -> None:
    start = replace(fresh(), devices=devices, rules=(*KERNELS_RULES, *foreign))
    whole = after(start, plan_present(start, pod))
    assert not plan_present(whole, pod)
    rules = data.draw(st.lists(st.sampled_from(whole.rules), unique=True))
    routes = data.draw(st.frozensets(st.sampled_from(sorted(whole.routes, key=repr)))) if whole.routes else frozenset()
    damaged = replace(
        whole,
        rules=tuple(r for r in whole.rules if r not in rules or r.priority > 8),
        routes=whole.routes - routes,
    )
    mended = after(damaged, plan_present(damaged, pod))
    assert set(mended.rules) == set(whole.rules)
    assert mended.routes == whole.routes


@given(devices=devices, pod=st.lists(addresses, max_size=2, unique=True), foreign=foreign_rules)
def test_leaving_restores_every_rule_and_takes_every_route_of_ours(
    devices: tuple[Device, ...], pod: list[routing.IPAddress], foreign: list[Rule]
) -> None:
    start = replace(fresh(), devices=devices, rules=(*KERNELS_RULES, *foreign))
    whole = after(start, plan_present(start, pod))
    steps = plan_absent(whole)
    left = after(whole, steps)
    assert set(left.rules) == set(start.rules)
    assert left.routes == frozenset()
    assert not plan_absent(replace(left, table=None))


@given(devices=devices, changed=devices, pod=st.lists(addresses, max_size=2, unique=True))
def test_routes_follow_the_devices(
    devices: tuple[Device, ...], changed: tuple[Device, ...], pod: list[routing.IPAddress]
) -> None:
    start = replace(fresh(), devices=devices)
    whole = after(start, plan_present(start, pod))
    moved = replace(whole, devices=changed)
    assert after(moved, plan_present(moved, pod)).routes == frozenset(routing.wanted_routes(moved, pod))


# === the kernel's side ===


@pytest.fixture
def namespace() -> Iterator[Netns]:
    made = Netns()
    yield made
    made.close()


@pytest.mark.root
def test_what_the_kernel_refuses_is_an_error_that_names_it(namespace: Netns) -> None:
    """As when a device goes between the look and the step."""
    gone = Steps(add_routes=(Route(77, None, 97),), table=1338)

    def work() -> None:
        with RouteSocket() as netlink:
            routing.apply(netlink, socket.AF_INET, gone)

    with pytest.raises(
        RoutingError, match=r"refused to add Route.*ifindex=77.* in table 1338: No such device; it is tried again"
    ):
        netns.run_in(namespace.fd, work)


@pytest.mark.root
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_what_is_applied_is_what_is_read_back(namespace: Netns, family: int) -> None:
    namespace.ip(
        "link add eth0 type veth peer name eth0p",
        "link set eth0p up",
        "link set eth0 up",
        "addr add 10.0.0.5/24 dev eth0",
        "addr add fd00::5/64 dev eth0 nodad",
    )

    def work() -> tuple[FamilyState, FamilyState, FamilyState]:
        with RouteSocket() as netlink:
            before = routing.read(netlink).states()[family]
            routing.apply(netlink, family, plan_present(before, [POD4, POD6]))
            present = routing.read(netlink).states()[family]
            namespace.ip(*(f"route add local {all_} dev lo table 1338 metric 7 proto boot" for all_ in ("0/0", "::/0")))
            routing.apply(netlink, family, plan_present(routing.read(netlink).states()[family], [POD4, POD6]))
            assert routing.read(netlink).states()[family] == present, "a route of somebody else stays in our table"
            routing.apply(netlink, family, plan_absent(present))
            return before, present, routing.read(netlink).states()[family]

    rules = namespace.run("ip", "-details", "rule")
    before, present, absent = netns.run_in(namespace.fd, work)
    assert namespace.run("ip", "-details", "rule") == rules, "the kernel's own rule is not back as it was"
    assert not plan_present(present, [POD4, POD6])
    assert present.table == 1338
    assert absent == before


@pytest.mark.root
@pytest.mark.parametrize(
    "selector",
    [
        "iif lo",
        "oif lo",
        "ipproto 6",
        "sport 80",
        "dport 80",
        "uidrange 0-0",
        "from 10.0.0.0/8",
        "tos 8",
        "not",
        "suppress_prefixlength 0",
    ],
)
def test_a_rule_that_selects_by_more_than_the_mark_is_not_taken_for_ours(namespace: Netns, selector: str) -> None:
    namespace.run("ip", "rule", "add", "pref", "1", "fwmark", hex(marks.CAPTURE), *selector.split(), "lookup", "1338")

    def work() -> None:
        with RouteSocket() as netlink:
            plan_present(routing.read(netlink).states()[socket.AF_INET], [POD4])

    with pytest.raises(RoutingError, match="preference 1, ahead of"):
        netns.run_in(namespace.fd, work)


@pytest.mark.parametrize("rule", [Rule(100, marks.CAPTURE, 77), Rule(1, marks.CAPTURE, -1), Rule(1, 0x1, 77)])
def test_a_table_of_somebody_else_is_never_taken_for_ours(rule: Rule) -> None:
    assert routing.our_table([*KERNELS_RULES, rule]) is None


@pytest.mark.root
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_device_that_is_down_hinders_nothing_and_counts_once_it_is_up(namespace: Netns, family: int) -> None:
    """Tunnel modules leave one in every namespace: tunl0, sit0, ip6tnl0."""
    namespace.ip(
        "link add down0 type veth peer name down0p", "addr add 10.0.0.5/24 dev lo", "addr add fd00::5 dev lo nodad"
    )

    def work() -> FamilyState:
        with RouteSocket() as netlink:
            routing.apply(netlink, family, plan_present(routing.read(netlink).states()[family], [POD4, POD6]))
            return routing.read(netlink).states()[family]

    before = netns.run_in(namespace.fd, work)
    assert {route.ifindex for route in before.routes} == {LO_INDEX}
    assert not plan_present(before, [POD4, POD6])
    namespace.ip("link set down0 up", "link set down0p up")
    assert len(netns.run_in(namespace.fd, work).routes) == 3
