"""Prometheus metrics of the control plane, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class Metrics:
    """One instance per server; names start with `undermesh_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.csrs = Counter(
            "undermesh_ca_requests",
            "Certificate requests by result: signed, refused, malformed, limited, failed",
            ["result"],
            registry=self.registry,
        )
        self.xds_clients = Gauge("undermesh_xds_clients", "Connected xDS streams", registry=self.registry)
        self.xds_pushes = Counter("undermesh_xds_pushes", "xDS responses sent", ["type"], registry=self.registry)
        self.xds_nacks = Counter(
            "undermesh_xds_nacks", "xDS responses that a client refused", ["type"], registry=self.registry
        )
        self.resources = Gauge("undermesh_xds_resources", "Published resources", ["type"], registry=self.registry)
        self.reporting_nodes = Gauge(
            "undermesh_reporting_nodes", "Nodes with an open report stream", registry=self.registry
        )
        self.report_timeouts = Counter(
            "undermesh_report_timeouts",
            "Clients that did not acknowledge reported state in time",
            registry=self.registry,
        )
        self.issuer_expiry = Gauge(
            "undermesh_ca_issuer_expiry_seconds", "Unix time at which the CA expires", registry=self.registry
        )
