"""Cluster IPs and node ports of Services: which are taken, and what a new Service gets.

https://kubernetes.io/docs/concepts/services-networking/dual-stack/
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from undermesh.lab.apiserver.errors import Cause, Object
from undermesh.lab.apiserver.store import Change, Op
from undermesh.lab.apiserver.validation import invalid_value

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
NODE_PORTS = range(30000, 32768)
_FIRST = 10
"""Offset of the first address given out unasked; those below are for Services that name theirs."""


def family(address: str) -> str:
    """`IPv4` or `IPv6`."""
    return f"IPv{ipaddress.ip_address(address).version}"


class AllocationError(Exception):
    """A Service asks for an address or port that it cannot have."""

    def __init__(self, causes: list[Cause]) -> None:
        super().__init__("; ".join(cause.message for cause in causes))
        self.causes = causes


class Addresses:
    """Follows the stored Services and fills in what new ones lack. The first CIDR's family is the default one."""

    def __init__(self, cidrs: Sequence[str]) -> None:
        networks = [ipaddress.ip_network(cidr) for cidr in cidrs]
        self._networks: dict[str, Network] = {f"IPv{network.version}": network for network in networks}
        self._addresses: dict[str, str] = {}
        self._ports: dict[tuple[str, int], str] = {}
        self._next_address = dict.fromkeys(self._networks, _FIRST)
        self._next_port = 0

    @property
    def families(self) -> list[str]:
        return list(self._networks)

    def first(self) -> list[str]:
        """The first address of each range, that of the Service `kubernetes`."""
        return [str(network[1]) for network in self._networks.values()]

    def observe(self, resource: str, change: Change) -> None:
        """Called after each write."""
        if resource != "services":
            return
        if change.old is not None:
            self._release(change.old.obj)
        if change.op is not Op.DELETED:
            self.claim(change.new.obj)

    def claim(self, service: Object) -> None:
        uid, spec = service["metadata"]["uid"], service["spec"]
        for address in spec.get("clusterIPs") or ():
            if address != "None":
                self._addresses[address] = uid
        for protocol, port in _node_ports(spec):
            self._ports[(protocol, port)] = uid

    def _release(self, service: Object) -> None:
        uid, spec = service["metadata"]["uid"], service["spec"]
        for address in spec.get("clusterIPs") or ():
            if self._addresses.get(address) == uid:
                del self._addresses[address]
        for taken in _node_ports(spec):
            if self._ports.get(taken) == uid:
                del self._ports[taken]

    def complete(self, service: Object, old: Object | None) -> None:
        """Give `service` its families, addresses and node ports. Raises AllocationError."""
        spec = service["spec"]
        if spec["type"] == "ExternalName":
            for key in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
                spec.pop(key, None)
            return
        if old is not None:
            _keep(spec, old["spec"])
        self._families(spec)
        self._cluster_ips(spec, service["metadata"]["uid"])
        self._node_ports(spec, service["metadata"]["uid"])

    def _families(self, spec: Object) -> None:
        if spec.get("clusterIP") and not spec.get("clusterIPs"):
            spec["clusterIPs"] = [spec["clusterIP"]]
        given = [address for address in spec.get("clusterIPs") or () if address != "None"]
        asked = list(spec.get("ipFamilies") or ()) or [family(address) for address in given] or self.families[:1]
        both = len(asked) > 1 or len(given) > 1
        policy = spec.setdefault("ipFamilyPolicy", "RequireDualStack" if both else "SingleStack")
        if policy == "SingleStack":
            asked = asked[:1]
        else:
            asked += [name for name in self.families if name not in asked]
        for index, name in enumerate(asked):
            if name not in self._networks:
                text = (
                    f"not configured on this cluster; service CIDRs are {', '.join(map(str, self._networks.values()))}"
                )
                raise AllocationError([invalid_value(f"spec.ipFamilies[{index}]", name, text)])
        if policy == "RequireDualStack" and len(asked) < 2:
            text = "this cluster is not configured for dual-stack services"
            raise AllocationError([invalid_value("spec.ipFamilyPolicy", policy, text)])
        spec["ipFamilies"] = asked

    def _cluster_ips(self, spec: Object, uid: str) -> None:
        if spec.get("clusterIPs") == ["None"]:
            spec["clusterIP"] = "None"
            return
        by_family = {family(address): address for address in spec.get("clusterIPs") or ()}
        for index, (name, address) in enumerate(by_family.items()):
            if ipaddress.ip_address(address) not in self._networks.get(name, ()):
                text = (
                    f"failed to allocate IP {address}: the provided IP ({address}) is not in the valid range. "
                    f"The range of valid IPs is {self._networks.get(name)}"
                )
                raise AllocationError([invalid_value(f"spec.clusterIPs[{index}]", address, text)])
            if self._addresses.get(address, uid) != uid:
                text = f"failed to allocate IP {address}: provided IP is already allocated"
                raise AllocationError([invalid_value(f"spec.clusterIPs[{index}]", [address], text)])
        spec["clusterIPs"] = [by_family.get(name) or self._free_address(name) for name in spec["ipFamilies"]]
        spec["clusterIP"] = spec["clusterIPs"][0]

    def _free_address(self, name: str) -> str:
        network = self._networks[name]
        size = min(network.num_addresses - 1, 65534)
        for _ in range(size):
            offset = self._next_address[name]
            self._next_address[name] = offset + 1 if offset + 1 < size else _FIRST
            address = str(network[offset])
            if address not in self._addresses:
                return address
        raise AllocationError(
            [invalid_value("spec.clusterIPs", [], f"failed to allocate a serviceIP: range {network} is full")]
        )

    def _node_ports(self, spec: Object, uid: str) -> None:
        kind = spec["type"]
        if kind == "ClusterIP" or (kind == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts") is False):
            return
        mine: dict[tuple[str, int], None] = {}
        for index, port in enumerate(spec.get("ports") or ()):
            wanted = port.get("nodePort")
            if wanted:
                if wanted not in NODE_PORTS:
                    text = "provided port is not in the valid range. The range of valid ports is 30000-32767"
                    raise AllocationError([invalid_value(f"spec.ports[{index}].nodePort", wanted, text)])
                if self._ports.get((port["protocol"], wanted), uid) != uid or (port["protocol"], wanted) in mine:
                    raise AllocationError(
                        [invalid_value(f"spec.ports[{index}].nodePort", wanted, "provided port is already allocated")]
                    )
            else:
                wanted = port["nodePort"] = self._free_port(port["protocol"], mine)
            mine[(port["protocol"], wanted)] = None

    def _free_port(self, protocol: str, mine: dict[tuple[str, int], None]) -> int:
        for _ in NODE_PORTS:
            port = NODE_PORTS[(self._next_port * 1009 + 113) % len(NODE_PORTS)]
            self._next_port += 1
            if (protocol, port) not in self._ports and (protocol, port) not in mine:
                return port
        raise AllocationError([invalid_value("spec.ports", [], "failed to allocate a nodePort: range is full")])


def _keep(spec: Object, before: Object) -> None:
    """An update that does not name its addresses and ports keeps them."""
    if before.get("type") != "ExternalName":
        if "clusterIP" not in spec and before.get("clusterIP"):
            spec["clusterIP"] = before["clusterIP"]
        if not spec.get("clusterIPs") and before.get("clusterIPs") and before["clusterIPs"][0] == spec.get("clusterIP"):
            spec["clusterIPs"] = list(before["clusterIPs"])
        for key in ("ipFamilies", "ipFamilyPolicy"):
            if key not in spec and key in before:
                spec[key] = before[key]
    if spec["type"] == "ClusterIP":
        for port in spec.get("ports") or ():
            port.pop("nodePort", None)
        return
    known = {(port.get("protocol"), port.get("port")): port.get("nodePort") for port in before.get("ports") or ()}
    for port in spec.get("ports") or ():
        found = known.get((port.get("protocol"), port.get("port")))
        if not port.get("nodePort") and found:
            port["nodePort"] = found


def _node_ports(spec: Object) -> list[tuple[str, int]]:
    return [(port.get("protocol", "TCP"), port["nodePort"]) for port in spec.get("ports") or () if port.get("nodePort")]
