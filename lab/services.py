"""kube-proxy's stand-in: cluster IPs as DNAT in the node's netns, for pods that are not enrolled.

What an enrolled pod sends to a service is captured before it leaves the pod and never gets here.
"""

from __future__ import annotations

from undermesh.lab.manifest import Manifest

TABLE = "um_services"


def ruleset(manifest: Manifest) -> str:
    """The nftables table for every service of the manifest, in nft's own language.

    A service port without endpoints refuses at once, as kube-proxy does.
    """
    rules = []
    for service in manifest.services:
        for port in service.ports:
            for address in service.addresses:
                family = "ip6" if ":" in address else "ip"
                endpoints = [
                    endpoint
                    for endpoint in manifest.endpoints(service, port)
                    if (":" in endpoint[0]) == (family == "ip6")
                ]
                rules.append(f"{family} daddr {address} tcp dport {port.port} {_verdict(family, endpoints)}")
    body = "\n".join(f"    {rule}" for rule in rules if "dnat" in rule)
    refused = "\n".join(f"    {rule}" for rule in rules if "reject" in rule)
    return (
        f"table inet {TABLE} {{\n"
        f"  chain services {{\n    type nat hook prerouting priority dstnat;\n{body}\n  }}\n"
        f"  chain empty {{\n    type filter hook prerouting priority filter;\n{refused}\n  }}\n"
        "}\n"
    )


def _verdict(family: str, endpoints: list[tuple[str, int]]) -> str:
    if not endpoints:
        return "reject with tcp reset"
    choices = ", ".join(f"{number} : {address} . {port}" for number, (address, port) in enumerate(endpoints))
    return f"dnat {family} to numgen inc mod {len(endpoints)} map {{ {choices} }}"
