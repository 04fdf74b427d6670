"""The hostPorts of one pod on its node: what the CNI plugin portmap does elsewhere, from the pod's status."""

from __future__ import annotations

from undermesh.lab.client.resources import Object
from undermesh.lab.kubeproxy.ports import PROTOCOLS, family_of
from undermesh.lab.kubeproxy.ruleset import HEADER, Element, Fragment

_ENDED = ("Succeeded", "Failed")
_ANY = ("", "0.0.0.0", "::")


def hostport_fragment(pod: Object) -> Fragment:
    """Empty if the pod is on the node's network, has no address yet, has ended, or wants no port."""
    spec, status = pod["spec"], pod.get("status") or {}
    if spec.get("hostNetwork") or status.get("phase") in _ENDED:
        return Fragment()
    addresses = [entry["ip"] for entry in status.get("podIPs") or ()] or [a for a in (status.get("podIP"),) if a]
    chains: dict[str, tuple[str, ...]] = {}
    elements: dict[Element, str] = {}
    for port in _host_ports(spec):
        protocol, number, host_ip = port.get("protocol", "TCP").lower(), port["hostPort"], port.get("hostIP") or ""
        for address in addresses:
            family = family_of(address)
            if host_ip and family_of(host_ip) != family:
                continue
            metadata = pod["metadata"]
            chain = f"hostport-{metadata['namespace']}/{metadata['name']}/{protocol}/{number}/{family}"
            target = f"[{address}]" if family == 6 else address
            header = HEADER[family]
            chains[chain] = (
                f"{header} saddr {address} jump masquerade_later",
                f"meta l4proto {protocol} dnat {header} to {target}:{port['containerPort']}",
            )
            if host_ip in _ANY:
                elements[f"any_host_ports{family}", f"{protocol} . {number}"] = f"goto {chain}"
            else:
                elements[f"host_ports{family}", f"{host_ip} . {protocol} . {number}"] = f"goto {chain}"
    return Fragment(chains, {}, elements)


def _host_ports(spec: Object) -> list[Object]:
    always = [c for c in spec.get("initContainers") or () if c.get("restartPolicy") == "Always"]
    return [
        port
        for container in (*always, *(spec.get("containers") or ()))
        for port in container.get("ports") or ()
        if port.get("hostPort") and port.get("protocol", "TCP") in PROTOCOLS
    ]
