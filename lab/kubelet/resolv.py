"""A pod's /etc/resolv.conf and /etc/hosts. Pure.

Sources: kubernetes pkg/kubelet/network/dns/dns.go, pkg/kubelet/kubelet_pods.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from undermesh.lab.client import Object
from undermesh.lab.kubelet import pods

_CLUSTER_OPTIONS = ("ndots:5",)
_MOST_SERVERS, _MOST_SEARCHES = 3, 32


@dataclass(frozen=True)
class ResolvConf:
    """The entries of a resolv.conf."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def text(self) -> str:
        lines = [f"search {' '.join(self.searches)}"] if self.searches else []
        lines += [f"nameserver {server}" for server in self.servers]
        if self.options:
            lines.append(f"options {' '.join(self.options)}")
        return "".join(f"{line}\n" for line in lines)


def parse(text: str) -> ResolvConf:
    """Read a resolv.conf."""
    servers: list[str] = []
    searches: list[str] = []
    options: list[str] = []
    for line in text.splitlines():
        word, *rest = line.split() or [""]
        if word == "nameserver" and rest:
            servers.append(rest[0])
        elif word == "search":
            searches = rest
        elif word == "options":
            options = rest
    return ResolvConf(tuple(servers), tuple(searches), tuple(options))


def for_pod(pod: Object, dns_address: str, domain: str, node: ResolvConf) -> ResolvConf:
    """What a pod's dnsPolicy and dnsConfig make of it."""
    policy = pod["spec"].get("dnsPolicy") or "ClusterFirst"
    if policy == "ClusterFirstWithHostNet" or (policy == "ClusterFirst" and not pods.host_network(pod)):
        own = (f"{pods.namespace(pod)}.svc.{domain}", f"svc.{domain}", domain)
        base = ResolvConf((dns_address,), _once((*own, *node.searches)), _CLUSTER_OPTIONS)
    elif policy == "None":
        base = ResolvConf()
    else:
        base = node
    config = pod["spec"].get("dnsConfig") or {}
    return ResolvConf(
        _once((*base.servers, *(config.get("nameservers") or ())))[:_MOST_SERVERS],
        _once((*base.searches, *(config.get("searches") or ())))[:_MOST_SEARCHES],
        _options(base.options, config.get("options") or ()),
    )


def _once(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


def _options(base: Sequence[str], more: Sequence[Object]) -> tuple[str, ...]:
    """A pod's options replace those of the same name."""
    merged = {option.partition(":")[0]: option for option in base}
    for option in more:
        value = option.get("value")
        merged[option["name"]] = option["name"] if not value else f"{option['name']}:{value}"
    return tuple(merged.values())


def hosts(pod: Object, addresses: Sequence[str], hostname: str, domain: str) -> str:
    """The /etc/hosts of a pod with a network of its own."""
    lines = [
        "# Kubernetes-managed hosts file.",
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        "fe00::0\tip6-localnet",
        "fe00::0\tip6-mcastprefix",
        "fe00::1\tip6-allnodes",
        "fe00::2\tip6-allrouters",
    ]
    subdomain = pod["spec"].get("subdomain")
    full = f"{hostname}.{subdomain}.{pods.namespace(pod)}.svc.{domain}\t{hostname}" if subdomain else hostname
    lines += [f"{address}\t{full}" for address in addresses]
    return _with_aliases(lines, pod)


def host_network_hosts(pod: Object, node_hosts: str) -> str:
    """The /etc/hosts of a pod with the node's network."""
    return _with_aliases(["# Kubernetes-managed hosts file (host network).", *node_hosts.splitlines()], pod)


def _with_aliases(lines: list[str], pod: Object) -> str:
    aliases = pod["spec"].get("hostAliases") or ()
    if aliases:
        lines = [*lines, "", "# Entries added by HostAliases."]
        lines += ["\t".join((alias["ip"], *alias.get("hostnames", ()))) for alias in aliases]
    return "".join(f"{line}\n" for line in lines)
