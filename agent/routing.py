"""Policy routing in a pod's netns: what must be there, what is there, and the steps between the two.

Per address family (design section 3, "Capture"):
* rules, ahead of every foreign one: CAPTURE and DELIVERY go to a table of ours and nowhere else, so that a
  missing route fails closed; the kernel's `local` rule moves behind them, or traffic to the pod's own
  address would look like fresh inbound;
* in the table, `local default` through lo, and through every other device, which catches sockets that are
  bound to one.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyroute2 import IPRoute, NetlinkError

from undermesh.agent.bpf.layout import IPAddress
from undermesh.gen import marks

LO_INDEX: Final = 1
LO_METRIC: Final = 10
DEVICE_METRIC: Final = 20  # plus the device's index: equal metrics would exclude each other

CAPTURE_PREFERENCE: Final = 1
CAPTURE_BARRIER_PREFERENCE: Final = 2
DELIVERY_PREFERENCE: Final = 3
DELIVERY_BARRIER_PREFERENCE: Final = 4
LOCAL_PREFERENCE: Final = 8
_OUR_PREFERENCES: Final = range(CAPTURE_PREFERENCE, LOCAL_PREFERENCE + 1)

_TABLE_LOCAL: Final = 255
_FIRST_TABLE: Final = 1338
_ACTION_LOOKUP: Final = 1
_ACTION_UNREACHABLE: Final = 7
_FULL_MASK: Final = 0xFFFFFFFF
_ROUTE_LOCAL: Final = 2
_IFF_UP: Final = 1

FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)


class RoutingError(Exception):
    """The namespace cannot take our rules; the message says what stands in the way and what to do."""


@dataclass(frozen=True)
class Rule:
    """One `ip rule`; table 0 means the rule looks nothing up."""

    priority: int
    fwmark: int
    table: int
    action: int = _ACTION_LOOKUP


@dataclass(frozen=True)
class Route:
    """One `local default` route of our table."""

    ifindex: int
    source: IPAddress | None
    metric: int


@dataclass(frozen=True)
class Device:
    """An interface that is up, with the addresses of one family, in the kernel's order, without link-local ones."""

    ifindex: int
    name: str
    addresses: tuple[IPAddress, ...]


@dataclass(frozen=True)
class FamilyState:
    """What one family of a namespace looks like."""

    family: int
    enabled: bool
    rules: tuple[Rule, ...]
    routes: frozenset[Route]  # of our table
    devices: tuple[Device, ...]
    used_tables: frozenset[int]
    table: int | None  # ours, by our rule or by what is remembered


@dataclass(frozen=True)
class Steps:
    """The changes that make a family right, to be taken in this order."""

    add_routes: tuple[Route, ...] = ()
    add_rules: tuple[Rule, ...] = ()
    delete_rules: tuple[Rule, ...] = ()
    delete_routes: tuple[Route, ...] = ()
    table: int = 0

    def __bool__(self) -> bool:
        return bool(self.add_routes or self.add_rules or self.delete_rules or self.delete_routes)


def our_table(rules: Iterable[Rule]) -> int | None:
    """The table that our capture rule names, if there is such a rule."""
    for rule in rules:
        ours = rule.priority == CAPTURE_PREFERENCE and rule.fwmark == marks.CAPTURE
        if ours and rule.action == _ACTION_LOOKUP and rule.table > 0:
            return rule.table
    return None


def free_table(used: Iterable[int]) -> int:
    taken = set(used)
    return next(table for table in range(_FIRST_TABLE, 1 << 30) if table not in taken)


def wanted_rules(table: int) -> tuple[Rule, ...]:
    return (
        Rule(CAPTURE_PREFERENCE, marks.CAPTURE, table),
        Rule(CAPTURE_BARRIER_PREFERENCE, marks.CAPTURE, 0, _ACTION_UNREACHABLE),
        Rule(DELIVERY_PREFERENCE, marks.DELIVERY, table),
        Rule(DELIVERY_BARRIER_PREFERENCE, marks.DELIVERY, 0, _ACTION_UNREACHABLE),
        Rule(LOCAL_PREFERENCE, 0, _TABLE_LOCAL),
    )


def wanted_routes(state: FamilyState, pod_addresses: Sequence[IPAddress]) -> tuple[Route, ...]:
    """`local default` through lo and through every other device.

    Each IPv4 route names a source, without which the kernel would pick the destination's address; a device
    without an address of its own lends the pod's.
    """
    if not state.enabled:
        return ()
    version = 4 if state.family == socket.AF_INET else 6
    own = [address for address in pod_addresses if address.version == version]
    others = [address for device in state.devices if device.ifindex != LO_INDEX for address in device.addresses]
    source = next(iter(own + others), None)
    if source is None and version == 4:
        return ()
    routes = [Route(LO_INDEX, source, LO_METRIC)]
    for device in state.devices:
        if device.ifindex != LO_INDEX:
            device_source = next(iter(device.addresses), source)
            routes.append(Route(device.ifindex, device_source, DEVICE_METRIC + device.ifindex))
    return tuple(routes)


def plan_present(state: FamilyState, pod_addresses: Sequence[IPAddress]) -> Steps:
    """The steps that bring capture routing up, or back to what it should be.

    Raises:
        RoutingError: a foreign rule stands before ours.
    """
    table = state.table or free_table(state.used_tables)
    rules = wanted_rules(table)
    foreign = [rule for rule in state.rules if _is_foreign(rule, table)]
    if foreign:
        raise RoutingError(
            f"an ip rule of another owner has preference {foreign[0].priority}, ahead of "
            f"{LOCAL_PREFERENCE}: move it behind {LOCAL_PREFERENCE}, undermesh must come first"
        )
    routes = wanted_routes(state, pod_addresses)
    first_local = Rule(0, 0, _TABLE_LOCAL)
    return Steps(
        add_routes=tuple(route for route in routes if route not in state.routes),
        add_rules=tuple(rule for rule in rules if rule not in state.rules),
        delete_rules=(first_local,) if first_local in state.rules else (),
        delete_routes=tuple(state.routes.difference(routes)),
        table=table,
    )


def plan_absent(state: FamilyState) -> Steps:
    """The steps that take everything of ours out again; the kernel's own `local` rule comes back first."""
    table = state.table
    first_local = Rule(0, 0, _TABLE_LOCAL)
    ours = [
        rule
        for rule in state.rules
        if rule.priority in _OUR_PREFERENCES
        and (rule in wanted_rules(table or 0) or rule == Rule(LOCAL_PREFERENCE, 0, _TABLE_LOCAL))
    ]
    return Steps(
        add_rules=(first_local,) if first_local not in state.rules else (),
        delete_rules=tuple(ours),
        delete_routes=tuple(state.routes),
        table=table or 0,
    )


def _is_foreign(rule: Rule, table: int) -> bool:
    return rule.priority <= LOCAL_PREFERENCE and rule not in (*wanted_rules(table), Rule(0, 0, _TABLE_LOCAL))


# === netlink: to be called inside the namespace (netns.run_in) ===


def read(netlink: IPRoute, family: int, remembered_table: int | None = None) -> FamilyState:
    """The present state of one family in the namespace of the netlink socket.

    Args:
        remembered_table: our table as it was, for when the rule that names it is missing.
    """
    all_rules = [_rule(message) for message in netlink.get_rules(family=family)]
    tables = {rule.table for rule in all_rules}
    table = our_table(all_rules) or remembered_table
    routes = set()
    for message in netlink.get_routes(family=family):
        number = message.get_attr("RTA_TABLE") or message["table"]
        tables.add(number)
        route = _route(message)
        if number == table and route is not None:
            routes.add(route)
    return FamilyState(
        family=family,
        enabled=family == socket.AF_INET or ipv6_on(),
        rules=tuple(all_rules),
        routes=frozenset(routes),
        devices=_devices(netlink, family),
        used_tables=frozenset(tables),
        table=table,
    )


def apply(netlink: IPRoute, family: int, steps: Steps) -> None:
    """Takes the steps.

    Raises:
        RoutingError: the kernel refused one, as it does when a device or an address has just gone.
    """
    for route in steps.add_routes:
        _do(netlink.route, "add", family, _route_arguments(route, steps.table))
    for rule in steps.add_rules:
        _do(netlink.rule, "add", family, _rule_arguments(rule))
    for rule in steps.delete_rules:
        _do(netlink.rule, "del", family, _rule_arguments(rule))
    for route in steps.delete_routes:
        _do(netlink.route, "del", family, _route_arguments(route, steps.table))


def _do(change: Callable[..., Any], verb: str, family: int, arguments: dict[str, Any]) -> None:
    try:
        change(verb, family=family, **arguments)
    except NetlinkError as e:
        what = ", ".join(f"{name} {value}" for name, value in arguments.items())
        raise RoutingError(f"the kernel refused to {verb} ({what}): {os.strerror(e.code)}; it is tried again") from e


def ipv6_on() -> bool:
    """Whether the calling thread's namespace has IPv6: a kernel without it, or a sysctl against it, is no error."""
    try:
        return Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text().strip() == "0"
    except FileNotFoundError:
        return False


def _rule(message: Any) -> Rule:
    mask = message.get_attr("FRA_FWMASK")
    mark = message.get_attr("FRA_FWMARK") or 0
    plain = mask in (None, _FULL_MASK) and not message["src_len"] and not message["dst_len"]
    selective = any(
        message.get_attr(name) is not None
        for name in (
            "FRA_IIFNAME",
            "FRA_OIFNAME",
            "FRA_IP_PROTO",
            "FRA_SPORT_RANGE",
            "FRA_DPORT_RANGE",
            "FRA_UID_RANGE",
        )
    )
    action = message["action"]
    table = message.get_attr("FRA_TABLE") or message["table"] if action == _ACTION_LOOKUP else 0
    # A rule with selectors that Rule has no field for must never pass for one of ours.
    return Rule(message.get_attr("FRA_PRIORITY") or 0, mark, table if plain and not selective else -1, action)


def _route(message: Any) -> Route | None:
    if message["type"] != _ROUTE_LOCAL or message["dst_len"] != 0:
        return None
    source = message.get_attr("RTA_PREFSRC")
    return Route(
        message.get_attr("RTA_OIF") or 0,
        ipaddress.ip_address(source) if source else None,
        message.get_attr("RTA_PRIORITY") or 0,
    )


def _devices(netlink: IPRoute, family: int) -> tuple[Device, ...]:
    addresses: dict[int, list[IPAddress]] = {}
    for message in netlink.get_addr(family=family):
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        address = ipaddress.ip_address(text)
        if not (address.version == 6 and address.is_link_local):
            addresses.setdefault(message["index"], []).append(address)
    return tuple(
        Device(link["index"], link.get_attr("IFLA_IFNAME"), tuple(addresses.get(link["index"], ())))
        for link in netlink.get_links()
        # Tunnel modules put devices into every namespace that nobody brings up, and IPv6 refuses routes by them.
        if link["flags"] & _IFF_UP
    )


def _rule_arguments(rule: Rule) -> dict[str, Any]:
    arguments: dict[str, Any] = {"priority": rule.priority}
    if rule.fwmark:
        arguments |= {"fwmark": rule.fwmark, "fwmask": _FULL_MASK}
    if rule.action == _ACTION_UNREACHABLE:
        arguments["action"] = "unreachable"
    else:
        arguments["table"] = rule.table
    return arguments


def _route_arguments(route: Route, table: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "dst": "default",
        "oif": route.ifindex,
        "type": "local",
        "priority": route.metric,
        "table": table,
    }
    if route.source is not None:
        arguments["prefsrc"] = str(route.source)
        if route.source.version == 4:
            arguments["scope"] = "host"
    return arguments
