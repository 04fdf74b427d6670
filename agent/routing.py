"""Policy routing in a pod's netns: what must be there, what is there, and the steps between the two.

Per address family (design section 3, "Capture"):
* rules, ahead of every foreign one: CAPTURE and DELIVERY go to a table of ours and nowhere else, so that a
  missing route fails closed; the kernel's `local` rule moves behind them, or traffic to the pod's own
  address would look like fresh inbound;
* ANSWER goes to the pod's own addresses as ever, so that a client that is bound to a device gets it by that device;
  what the kernel reflects of it, whose destination is not the pod's, goes the way of CAPTURE;
* in the table, `local default` through lo, and through every other device, which catches sockets that are
  bound to one.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from undermesh.agent import rtnetlink, sysctls
from undermesh.agent.bpf.layout import IPAddress
from undermesh.agent.rtnetlink import Change, NetlinkError, RouteSocket
from undermesh.gen import marks

LO_INDEX: Final = 1
LO_METRIC: Final = 10
DEVICE_METRIC: Final = 20  # plus the device's index: equal metrics would exclude each other

CAPTURE_PREFERENCE: Final = 1
CAPTURE_BARRIER_PREFERENCE: Final = 2
DELIVERY_PREFERENCE: Final = 3
DELIVERY_BARRIER_PREFERENCE: Final = 4
ANSWER_LOCAL_PREFERENCE: Final = 5
ANSWER_PREFERENCE: Final = 6
ANSWER_BARRIER_PREFERENCE: Final = 7
LOCAL_PREFERENCE: Final = 8
_OUR_PREFERENCES: Final = range(CAPTURE_PREFERENCE, LOCAL_PREFERENCE + 1)

_TABLE_LOCAL: Final = 255
_FIRST_TABLE: Final = 1338
_ACTION_LOOKUP: Final = 1
_ACTION_UNREACHABLE: Final = 7
_FULL_MASK: Final = 0xFFFFFFFF
_ROUTE_LOCAL: Final = 2
_IFF_UP: Final = 1

# linux/rtnetlink.h, linux/fib_rules.h, linux/if_addr.h, linux/if_link.h
_ROUTE_HEADER: Final = struct.Struct("=8BI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_RULE_HEADER: Final = struct.Struct("=8BI")  # family, dst_len, src_len, tos, table, two unused, action, flags
_ADDRESS_HEADER: Final = struct.Struct("=4BI")  # family, prefix length, flags, scope, index
_LINK_HEADER: Final = struct.Struct("=BxHiII")  # family, type, index, flags, change
_RTA_OIF: Final = 4
_RTA_PRIORITY: Final = 6
_RTA_PREFSRC: Final = 7
_RTA_TABLE: Final = 15
_FRA_PRIORITY: Final = 6
_FRA_FWMARK: Final = 10
_FRA_TABLE: Final = 15
_FRA_FWMASK: Final = 16
_FRA_PROTOCOL: Final = 21
_FRA_SUPPRESS_PREFIXLEN: Final = 14
_FRA_UNSET: Final = 0xFFFFFFFF
# IIFNAME, FLOW, TUN_ID, SUPPRESS_IFGROUP, OIFNAME, L3MDEV, UID_RANGE, IP_PROTO, SPORT_RANGE, DPORT_RANGE, DSCP,
# FLOWLABEL and its mask, the masks of both ports and of DSCP
_SELECTORS: Final = frozenset({3, 11, 12, 13, 17, 19, 20, *range(22, 31)})
_RULE_INVERTED: Final = 2
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_IFLA_IFNAME: Final = 3
_IFLA_EXT_MASK: Final = 29
_SKIP_STATISTICS: Final = 8
_PROTOCOL_ANY: Final = 0
_PROTOCOL_KERNEL: Final = 2
_PROTOCOL_STATIC: Final = 4
_SCOPE_UNIVERSE: Final = 0
_SCOPE_HOST: Final = 254
_SCOPE_NOWHERE: Final = 255  # any, in a deletion
_TABLE_COMPAT: Final = 252  # the table's number is in an attribute

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


_FIRST_LOCAL: Final = Rule(0, 0, _TABLE_LOCAL)  # the kernel's, where a namespace has it from the start


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
        Rule(ANSWER_LOCAL_PREFERENCE, marks.ANSWER, _TABLE_LOCAL),
        Rule(ANSWER_PREFERENCE, marks.ANSWER, table),
        Rule(ANSWER_BARRIER_PREFERENCE, marks.ANSWER, 0, _ACTION_UNREACHABLE),
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
    return Steps(
        add_routes=tuple(route for route in routes if route not in state.routes),
        add_rules=tuple(rule for rule in rules if rule not in state.rules),
        delete_rules=(_FIRST_LOCAL,) if _FIRST_LOCAL in state.rules else (),
        delete_routes=tuple(state.routes.difference(routes)),
        table=table,
    )


def plan_absent(state: FamilyState) -> Steps:
    """The steps that take everything of ours out again; the kernel's own `local` rule comes back first."""
    table = state.table
    ours = [
        rule
        for rule in state.rules
        if rule.priority in _OUR_PREFERENCES
        and (rule in wanted_rules(table or 0) or rule == Rule(LOCAL_PREFERENCE, 0, _TABLE_LOCAL))
    ]
    return Steps(
        add_rules=(_FIRST_LOCAL,) if _FIRST_LOCAL not in state.rules else (),
        delete_rules=tuple(ours),
        delete_routes=tuple(state.routes),
        table=table or 0,
    )


def _is_foreign(rule: Rule, table: int) -> bool:
    return rule.priority <= LOCAL_PREFERENCE and rule not in (*wanted_rules(table), _FIRST_LOCAL)


# === netlink: to be called inside the namespace (netns.run_in) ===


@dataclass(frozen=True)
class Snapshot:
    """Both families of a namespace as the kernel's messages have them."""

    rules: list[bytes]
    routes: list[bytes]
    addresses: list[bytes]
    links: list[bytes]
    ipv6: bool

    def digest(self) -> bytes:
        """Equal for equal states: what was in order once needs no second reading."""
        digest = hashlib.blake2b(bytes([self.ipv6]), digest_size=16)
        for messages in (self.rules, self.routes, self.addresses, self.links):
            digest.update(len(messages).to_bytes(4, "little"))
            digest.update(b"".join(messages))
        return digest.digest()

    def states(self, remembered: Mapping[int, int] | None = None) -> dict[int, FamilyState]:
        """What each family looks like.

        Args:
            remembered: our table of a family as it was, for when the rule that names it is missing.
        """
        on = {socket.AF_INET: True, socket.AF_INET6: self.ipv6}
        return {
            family: _family(
                family,
                on[family],
                [_of_family(family, each) for each in (self.rules, self.routes, self.addresses)],
                self.links,
                (remembered or {}).get(family),
            )
            for family in FAMILIES
        }


def read(netlink: RouteSocket) -> Snapshot:
    """The present state of the namespace of the netlink socket, in which the calling thread is.

    Raises:
        RoutingError: the kernel refused to tell, or changed faster than it could be read.
    """
    less = rtnetlink.pack_attributes([(_IFLA_EXT_MASK, _SKIP_STATISTICS)])
    try:
        return Snapshot(
            rules=netlink.dump(rtnetlink.GET_RULE, _RULE_HEADER.pack(*bytes(9))),
            routes=netlink.dump(rtnetlink.GET_ROUTE, _ROUTE_HEADER.pack(*bytes(9))),
            addresses=netlink.dump(rtnetlink.GET_ADDRESS, _ADDRESS_HEADER.pack(*bytes(5))),
            links=netlink.dump(rtnetlink.GET_LINK, _LINK_HEADER.pack(*bytes(5)) + less),
            ipv6=ipv6_on(),
        )
    except NetlinkError as e:
        raise RoutingError(f"rules and routes cannot be read: {e}; it is tried again") from e


def _of_family(family: int, messages: Iterable[bytes]) -> list[bytes]:
    return [message for message in messages if message[0] == family]


def _family(
    family: int, enabled: bool, found: Sequence[Sequence[bytes]], links: Sequence[bytes], remembered: int | None
) -> FamilyState:
    rules = tuple(_rule(message) for message in found[0])
    table = our_table(rules) or remembered
    tables = {rule.table for rule in rules}
    routes = set()
    for message in found[1]:
        number = message[4]
        if number != _TABLE_COMPAT and number != table:
            tables.add(number)
            continue
        given = rtnetlink.attributes(message, _ROUTE_HEADER.size)
        number = rtnetlink.number(given, _RTA_TABLE) or number
        tables.add(number)
        if number == table and message[7] == _ROUTE_LOCAL and message[1] == 0:
            routes.add(_route(given))
    return FamilyState(
        family=family,
        enabled=enabled,
        rules=rules,
        routes=frozenset(routes),
        devices=_devices(found[2], links),
        used_tables=frozenset(tables),
        table=table,
    )


def apply(netlink: RouteSocket, family: int, steps: Steps) -> None:
    """Takes the steps, each kind after the one before.

    Raises:
        RoutingError: the kernel refused one, as it does when a device or an address has just gone.
    """
    _take(netlink, family, rtnetlink.NEW_ROUTE, steps.add_routes, steps.table)
    _take(netlink, family, rtnetlink.NEW_RULE, steps.add_rules, steps.table)
    _take(netlink, family, rtnetlink.DELETE_RULE, steps.delete_rules, steps.table)
    _take(netlink, family, rtnetlink.DELETE_ROUTE, steps.delete_routes, steps.table)


def _take(netlink: RouteSocket, family: int, kind: int, what: Sequence[Rule | Route], table: int) -> None:
    new = kind in (rtnetlink.NEW_ROUTE, rtnetlink.NEW_RULE)
    bodies = [_rule_body(family, e, new) if isinstance(e, Rule) else _route_body(family, e, table, new) for e in what]
    codes = netlink.change([Change(kind, body) for body in bodies])
    for each, code in zip(what, codes, strict=True):
        if code:
            verb = "add" if new else "delete"
            where = f" in table {table}" if isinstance(each, Route) else ""
            raise RoutingError(f"the kernel refused to {verb} {each}{where}: {os.strerror(code)}; it is tried again")


def ipv6_on() -> bool:
    """Whether the calling thread's namespace has IPv6: a kernel without it, or a sysctl against it, is no error."""
    return sysctls.read("ipv6/conf/lo/disable_ipv6") == "0"


@functools.lru_cache(maxsize=1024)  # the pods of a node have nearly all rules in common
def _rule(message: bytes) -> Rule:
    _family, dst_len, src_len, tos, short_table, _, _, action, flags = _RULE_HEADER.unpack_from(message)
    given = rtnetlink.attributes(message, _RULE_HEADER.size)
    mark = rtnetlink.number(given, _FRA_FWMARK) or 0
    plain = not (src_len or dst_len or tos or flags & _RULE_INVERTED) and _SELECTORS.isdisjoint(given)
    plain = plain and rtnetlink.number(given, _FRA_FWMASK) in (None, _FULL_MASK)
    plain = plain and rtnetlink.number(given, _FRA_SUPPRESS_PREFIXLEN) in (None, _FRA_UNSET)
    table = rtnetlink.number(given, _FRA_TABLE) or short_table if action == _ACTION_LOOKUP else 0
    # A rule with selectors that Rule has no field for must never pass for one of ours.
    return Rule(rtnetlink.number(given, _FRA_PRIORITY) or 0, mark, table if plain else -1, action)


def _route(given: Mapping[int, bytes]) -> Route:
    source = given.get(_RTA_PREFSRC)
    return Route(
        rtnetlink.number(given, _RTA_OIF) or 0,
        None if source is None else ipaddress.ip_address(source),
        rtnetlink.number(given, _RTA_PRIORITY) or 0,
    )


def _devices(addresses: Iterable[bytes], links: Iterable[bytes]) -> tuple[Device, ...]:
    held: dict[int, list[IPAddress]] = {}
    for message in addresses:
        given = rtnetlink.attributes(message, _ADDRESS_HEADER.size)
        address = ipaddress.ip_address(given.get(_IFA_LOCAL) or given[_IFA_ADDRESS])
        if not (address.version == 6 and address.is_link_local):
            held.setdefault(_ADDRESS_HEADER.unpack_from(message)[4], []).append(address)
    devices = []
    for message in links:
        _family, _type, index, flags, _change = _LINK_HEADER.unpack_from(message)
        # Tunnel modules put devices into every namespace that nobody brings up, and IPv6 refuses routes by them.
        if flags & _IFF_UP:
            name = rtnetlink.attributes(message, _LINK_HEADER.size)[_IFLA_IFNAME].rstrip(b"\0").decode()
            devices.append(Device(index, name, tuple(held.get(index, ()))))
    return tuple(devices)


def _rule_body(family: int, rule: Rule, new: bool) -> bytes:
    given: list[tuple[int, int | bytes]] = [(_FRA_PRIORITY, rule.priority)]
    if rule.fwmark:
        given += [(_FRA_FWMARK, rule.fwmark), (_FRA_FWMASK, _FULL_MASK)]
    if rule.action == _ACTION_LOOKUP:
        given.append((_FRA_TABLE, rule.table))
    if new and rule == _FIRST_LOCAL:
        given.append((_FRA_PROTOCOL, bytes([_PROTOCOL_KERNEL])))  # back as the kernel had made it
    return _RULE_HEADER.pack(family, 0, 0, 0, 0, 0, 0, rule.action, 0) + rtnetlink.pack_attributes(given)


def _route_body(family: int, route: Route, table: int, new: bool) -> bytes:
    scope = _SCOPE_HOST if family == socket.AF_INET else _SCOPE_UNIVERSE
    # What is deleted may be somebody else's.
    protocol, scope = (_PROTOCOL_STATIC, scope) if new else (_PROTOCOL_ANY, _SCOPE_NOWHERE)
    header = (family, 0, 0, 0, _TABLE_COMPAT, protocol, scope, _ROUTE_LOCAL, 0)
    given: list[tuple[int, int | bytes]] = [
        (_RTA_TABLE, table),
        (_RTA_OIF, route.ifindex),
        (_RTA_PRIORITY, route.metric),
    ]
    if route.source is not None:
        given.append((_RTA_PREFSRC, route.source.packed))
    return _ROUTE_HEADER.pack(*header) + rtnetlink.pack_attributes(given)
