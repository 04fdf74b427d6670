"""Whether the cluster's DNS answers, asked from a node as a process there would ask."""

from __future__ import annotations

import dns.exception
import dns.message
import dns.query
import dns.rcode

from undermesh.lab import netns
from undermesh.lab.kube.layout import ClusterLayout, NodeLayout


def answers(cluster: ClusterLayout, node: NodeLayout, *, seconds: float = 0.3) -> bool:
    """Ask the DNS service for the API server's name, from a node's network namespace."""
    question = dns.message.make_query(f"kubernetes.default.svc.{cluster.domain}.", "A")

    def ask() -> bool:
        try:
            reply = dns.query.udp(question, cluster.dns_address, timeout=seconds)
        except (OSError, dns.exception.DNSException):
            return False
        return reply.rcode() == dns.rcode.NOERROR and bool(reply.answer)

    return netns.call(node.netns, ask)
