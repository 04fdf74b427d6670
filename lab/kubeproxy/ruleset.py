"""The table of one node as data, and the smallest transaction of nft that leads from one state to another.

Packets find their Service by one look-up in a verdict map of (address, protocol, port), so a change of one
Service touches its own chains and elements only. The table is in the family inet: names end in the family, 4 or 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

TABLE = "inet um_kube_proxy"
MASQUERADE_MARK = 0x4000
"""The bit that kube-proxy uses too: the mesh has to live with it."""
ADDRESS_TYPE = {4: "ipv4_addr", 6: "ipv6_addr"}
HEADER = {4: "ip", 6: "ip6"}

Element = tuple[str, str]
"""Map or set, and key."""


@dataclass(frozen=True)
class Fragment:
    """What one object of the API puts into the table.

    Attributes:
        chains: name -> rules.
        sets: name -> declaration.
        elements: -> verdict, empty for an element of a set.
    """

    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sets: Mapping[str, str] = field(default_factory=dict)
    elements: Mapping[Element, str] = field(default_factory=dict)


EMPTY = Fragment()


def merge(fragments: Mapping[str, Fragment]) -> Fragment:
    """All together. If two claim an address and port, the first by name has it, as long as it is there."""
    chains: dict[str, tuple[str, ...]] = {}
    sets: dict[str, str] = {}
    elements: dict[Element, str] = {}
    for name in sorted(fragments):
        fragment = fragments[name]
        chains.update(fragment.chains)
        sets.update(fragment.sets)
        for element, verdict in fragment.elements.items():
            elements.setdefault(element, verdict)
    return Fragment(chains, sets, elements)


def whole(base: str, wanted: Fragment) -> str:
    """The transaction that makes the table anew, whatever was there."""
    return f"add table {TABLE}\ndelete table {TABLE}\n{base}{transition(EMPTY, wanted)}"


def transition(old: Fragment, new: Fragment) -> str:
    """The transaction from `old` to `new`; empty if they are the same.

    Its order is what nft needs: nothing is used before it is there nor removed while it is used.
    """
    gone = [name for name in old.chains if name not in new.chains]
    changed = [name for name, rules in new.chains.items() if old.chains.get(name) != rules]
    moved = [key for key, verdict in old.elements.items() if new.elements.get(key) != verdict]
    fresh = {key: verdict for key, verdict in new.elements.items() if old.elements.get(key) != verdict}
    resized = [name for name, declared in old.sets.items() if new.sets.get(name) != declared]
    lines = [f"delete element {TABLE} {name} {{ {key} }}" for name, key in moved]
    lines += [f"flush chain {TABLE} {name}" for name in (*gone, *changed) if name in old.chains]
    lines += _uses_of(resized, old, new, changed)
    lines += [f"delete set {TABLE} {name}" for name in resized]
    lines += [
        f"add set {TABLE} {name} {{ {declared} }}"
        for name, declared in new.sets.items()
        if old.sets.get(name) != declared
    ]
    lines += [f"add chain {TABLE} {name}" for name in changed if name not in old.chains]
    lines += [f"add rule {TABLE} {name} {rule}" for name in changed for rule in new.chains[name]]
    lines += [
        f"add element {TABLE} {name} {{ {key}{f' : {verdict}' if verdict else ''} }}"
        for (name, key), verdict in fresh.items()
    ]
    lines += [f"delete chain {TABLE} {name}" for name in gone]
    return "".join(f"{line}\n" for line in lines)


def _uses_of(sets: list[str], old: Fragment, new: Fragment, changed: list[str]) -> list[str]:
    """A set can go only when no rule names it: flush the chains that stay as they are but use it."""
    lines = []
    for name, rules in new.chains.items():
        if name not in changed and any(f"@{used} " in rule for used in sets for rule in rules):
            lines.append(f"flush chain {TABLE} {name}")
            changed.append(name)
    return lines


def base(node_addresses: Iterable[str], pod_cidrs: Iterable[str]) -> str:
    """The part that is the same whatever Services there are.

    Args:
        node_addresses: where node ports are open.
        pod_cidrs: of the whole cluster: what comes from elsewhere to a cluster IP is masqueraded.
    """
    addresses, cidrs = list(node_addresses), list(pod_cidrs)
    lines = [f"table {TABLE} {{"]
    for family, kind in ADDRESS_TYPE.items():
        lines += [
            _map(f"services{family}", f"{kind} . inet_proto . inet_service"),
            _map(f"refused{family}", f"{kind} . inet_proto . inet_service"),
            _map(f"node_ports{family}", "inet_proto . inet_service"),
            _map(f"refused_node_ports{family}", "inet_proto . inet_service"),
            _map(f"host_ports{family}", f"{kind} . inet_proto . inet_service"),
            _map(f"any_host_ports{family}", "inet_proto . inet_service"),
            f"set cluster_ips{family} {{ type {kind}; }}",
            _set(f"node_ips{family}", kind, [a for a in addresses if _is(a, family)]),
            _set(f"pod_cidrs{family}", kind, [c for c in cidrs if _is(c, family)], "flags interval; "),
        ]
    lines += [_CHAINS, *_by_family("host_ports", _HOST_PORTS), *_by_family("services", _SERVICES)]
    lines += [*_by_family("refusals", _REFUSALS), "}"]
    return "\n".join(lines) + "\n"


def _is(address: str, family: int) -> bool:
    return (":" in address) == (family == 6)


def _map(name: str, key: str) -> str:
    return f"map {name} {{ type {key} : verdict; }}"


def _set(name: str, kind: str, elements: list[str], flags: str = "") -> str:
    members = f"elements = {{ {', '.join(elements)} }}; " if elements else ""
    return f"set {name} {{ type {kind}; {flags}{members}}}"


def _by_family(name: str, rules: str) -> list[str]:
    """A chain with the rules once per family."""
    text = "".join(rules.format(header=header, family=family) for family, header in HEADER.items())
    return [f"chain {name} {{\n{text}}}"]


_HOST_PORTS = """\
  {header} daddr . meta l4proto . th dport vmap @host_ports{family}
  meta nfproto ipv{family} fib daddr type local meta l4proto . th dport vmap @any_host_ports{family}
"""
_SERVICES = """\
  {header} daddr . meta l4proto . th dport vmap @services{family}
  {header} daddr @node_ips{family} meta l4proto . th dport vmap @node_ports{family}
"""
_REFUSALS = """\
  {header} daddr . meta l4proto . th dport vmap @refused{family}
  {header} daddr @node_ips{family} meta l4proto . th dport vmap @refused_node_ports{family}
  {header} daddr @cluster_ips{family} goto refuse
"""
_CHAINS = f"""\
chain masquerade_later {{ meta mark set meta mark or {MASQUERADE_MARK:#x}; }}
chain refuse {{ meta l4proto tcp reject with tcp reset; reject with icmpx type port-unreachable; }}
chain discard {{ drop; }}
chain prerouting {{ type nat hook prerouting priority -100; jump services; jump host_ports; }}
chain output {{ type nat hook output priority -100; jump services; jump host_ports; }}
chain postrouting {{
  type nat hook postrouting priority 100;
  meta mark and {MASQUERADE_MARK:#x} == 0 return
  meta mark set meta mark xor {MASQUERADE_MARK:#x}
  masquerade fully-random
}}
chain filter_input {{ type filter hook input priority 0; ct state new jump refusals; }}
chain filter_forward {{ type filter hook forward priority 0; ct state new jump refusals; }}
chain filter_output {{ type filter hook output priority 0; ct state new jump refusals; }}
"""
