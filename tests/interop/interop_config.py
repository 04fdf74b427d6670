"""Envoy's configurations: what a waypoint or gateway does with HBONE, as documented by Envoy and Istio.

Everything here is pure: dictionaries in the shape of envoy.config.bootstrap.v3.Bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HBONE_PORT = 15008
PROXY_PORT = 15900
"""Of the client: takes CONNECT in HTTP/1.1 and passes it on to the cluster that the header x-peer names."""

Config = dict[str, Any]
_EXTENSIONS = "type.googleapis.com/envoy.extensions"
_HCM = f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager"
_HTTP2 = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_LOG_FORMAT = {
    "authority": "%REQ(:AUTHORITY)%",
    "status": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "flags": "%RESPONSE_FLAGS%",
    "cluster": "%UPSTREAM_CLUSTER%",
    "tls_failure": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    "peer": "%DOWNSTREAM_PEER_URI_SAN%",
    "baggage": "%REQ(BAGGAGE)%",
    "forwarded": "%REQ(FORWARDED)%",
    "traceparent": "%REQ(TRACEPARENT)%",
    "protocol": "%PROTOCOL%",
    "connection": "%CONNECTION_ID%",
}


@dataclass(frozen=True)
class Credentials:
    """What an Envoy shows, and whom it expects: files in PEM, and URI names (exact, or a prefix)."""

    roots: Path
    certificate: Path | None
    exact: str = ""
    prefix: str = ""

    def context(self, kind: str) -> Config:
        """The transport socket; `kind` is Upstream or Downstream."""
        name: Config = {"exact": self.exact} if self.exact else {"prefix": self.prefix}
        common: Config = {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "alpn_protocols": ["h2"],
            "validation_context": {
                "trusted_ca": {"filename": str(self.roots)},
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": name}],
            },
        }
        if self.certificate is not None:
            file = {"filename": str(self.certificate)}
            common["tls_certificates"] = [{"certificate_chain": file, "private_key": file}]
        config: Config = {
            "@type": f"{_EXTENSIONS}.transport_sockets.tls.v3.{kind}TlsContext",
            "common_tls_context": common,
        }
        if kind == "Downstream":
            config["require_client_certificate"] = True
        return {"name": "envoy.transport_sockets.tls", "typed_config": config}


@dataclass(frozen=True)
class Target:
    """One cluster of the client: a peer's tunnel port, and how to speak to it."""

    address: str
    credentials: Credentials | None
    """None: plaintext."""
    http2: Config = field(default_factory=dict)
    """More of Http2ProtocolOptions."""
    common: Config = field(default_factory=dict)
    """More of HttpProtocolOptions for all versions."""


@dataclass(frozen=True)
class Tunnel:
    """A port of the client whose connections go through a tunnel to one authority."""

    authority: str
    target: str
    """The name of a Target; "" for connect_originate, the way that a waypoint takes."""


# === the client ===


def client(targets: Mapping[str, Target], tunnels: Mapping[int, Tunnel], originate: Credentials, log: Path) -> Config:
    """An Envoy that speaks HBONE to peers: per request at PROXY_PORT, and per connection at the tunnels' ports."""
    clusters = [_peer(name, target) for name, target in targets.items()]
    listeners = [_proxy(log)]
    for port, tunnel in tunnels.items():
        name = tunnel.target or f"to {tunnel.authority}"
        filter_ = _tcp_proxy(name, tunnel.authority) if tunnel.target else _tcp_proxy(name)
        listeners.append({"name": f"tunnel {port}", "address": _address("127.0.0.1", port), **_chain([filter_])})
        if not tunnel.target:
            clusters.append(_internal(name, "connect_originate", tunnel.authority))
    listeners.append(_connect_originate())
    clusters.append(_originate_cluster(originate))
    return _bootstrap(listeners, clusters)


def _proxy(log: Path) -> Config:
    route = {"match": {"connect_matcher": {}}, "route": {"cluster_header": "x-peer", "timeout": "0s"}}
    manager = _http_manager("proxy", [route], log, {"max_request_headers_kb": 8192})
    return {"name": "proxy", "address": _address("127.0.0.1", PROXY_PORT), **_chain([manager])}


def _peer(name: str, target: Target) -> Config:
    cluster: Config = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(target.address, HBONE_PORT)}}]}],
        },
        **_http2(target.http2, target.common),
    }
    if target.credentials is not None:
        cluster["transport_socket"] = target.credentials.context("Upstream")
    return cluster


# === the server ===


def _headers(count: int) -> list[Config]:
    """That many headers of 10 kB."""
    return [{"header": {"key": f"x{number}", "value": "x" * 10_000}} for number in range(count)]


FAULTS: dict[int, Config] = {
    # The reasons as a waypoint gives them: a policy's, an empty cluster's, one of its own.
    18403: {"direct_response": {"status": 403, "body": {"inline_string": "RBAC: access denied"}}},
    18404: {"direct_response": {"status": 404}},
    18503: {"route": {"cluster": "nobody"}},
    18504: {"route": {"cluster": "black hole"}},
    # A stream that is cut when nothing has moved for half a second, or after one second of life.
    18408: {"route": {"cluster": "local", "idle_timeout": "0.5s"}},
    18409: {"route": {"cluster": "local", "max_stream_duration": {"max_stream_duration": "0.7s"}}},
    # Answers with 10 and with 60 kB of headers.
    18510: {"route": {"cluster": "local"}, "response_headers_to_add": _headers(1)},
    18560: {"route": {"cluster": "local"}, "response_headers_to_add": _headers(6)},
}
"""Routes by the authority's port; each ends the CONNECT in its own way."""
CHAIN_PORT = 18800
"""Its tunnels go through connect_originate on to another peer."""


def server(
    credentials: Credentials,
    log: Path,
    *,
    http2: Config | None = None,
    common: Config | None = None,
    onward: tuple[str, Credentials] | None = None,
) -> Config:
    """An Envoy that ends tunnels: to the address that is asked for, to FAULTS, and `onward` to another peer."""
    routes = [_end(_port_match(port), fault) for port, fault in FAULTS.items()]
    clusters: list[Config] = [_local(), _static("nobody", []), _static("black hole", [_address("192.0.2.1", 9)])]
    listeners: list[Config] = []
    if onward is not None:
        authority, originate = onward
        routes.append(_end(_port_match(CHAIN_PORT), {"route": {"cluster": "main_internal"}}))
        listeners += [_main_internal("onward"), _connect_originate()]
        clusters += [
            _internal("main_internal", "main_internal", None),
            _internal("onward", "connect_originate", authority),
            _originate_cluster(originate),
        ]
    routes.append(_end({"connect_matcher": {}}, {"route": {"cluster": "local"}}))
    options: Config = {
        "max_concurrent_streams": 100,
        "connection_keepalive": {"interval": "0.5s", "timeout": "2s"},
        **(http2 or {}),
    }
    manager = _http_manager("connect_terminate", routes, log, {}, options, common or {})
    terminate = {
        "name": "connect_terminate",
        "address": _address("0.0.0.0", HBONE_PORT),
        "additional_addresses": [{"address": _address("::", HBONE_PORT)}],
        "connection_balance_config": {"exact_balance": {}},
        **_chain([manager], credentials.context("Downstream")),
    }
    return _bootstrap([terminate, *listeners], clusters)


def _port_match(port: int) -> Config:
    header = {"name": ":authority", "string_match": {"suffix": f":{port}"}}
    return {"connect_matcher": {}, "headers": [header]}


def _end(match: Config, rest: Config) -> Config:
    """A route that ends a CONNECT: the cluster gets the bytes inside of it."""
    if "route" in rest:
        upgrade = {"upgrade_type": "CONNECT", "connect_config": {}}
        rest = {**rest, "route": {"timeout": "0s", **rest["route"], "upgrade_configs": [upgrade]}}
    return {"match": match, **rest}


def _local() -> Config:
    return {
        "name": "local",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "2s",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": ":authority"},
    }


def _static(name: str, addresses: Sequence[Config]) -> Config:
    endpoints = [{"endpoint": {"address": address}} for address in addresses]
    assignment = {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}
    return {"name": name, "type": "STATIC", "connect_timeout": "60s", "load_assignment": assignment}


def _main_internal(cluster: str) -> Config:
    return {"name": "main_internal", "internal_listener": {}, **_chain([_tcp_proxy(cluster)])}


# === parts of both ===


def _connect_originate() -> Config:
    original = {
        "name": "envoy.filters.listener.original_dst",
        "typed_config": {"@type": f"{_EXTENSIONS}.filters.listener.original_dst.v3.OriginalDst"},
    }
    return {
        "name": "connect_originate",
        "internal_listener": {},
        "use_original_dst": False,
        "listener_filters": [original],
        **_chain([_tcp_proxy("connect_originate", "%DOWNSTREAM_LOCAL_ADDRESS%")]),
    }


def _originate_cluster(credentials: Credentials) -> Config:
    return {
        "name": "connect_originate",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "5s",
        "cleanup_interval": "60s",
        "original_dst_lb_config": {"upstream_port_override": HBONE_PORT},
        "transport_socket": credentials.context("Upstream"),
        **_http2({}, {}),
    }


def _internal(name: str, listener: str, destination: str | None) -> Config:
    """A cluster that is an internal listener; `destination` is what that listener takes for the original one."""
    endpoint: Config = {
        "endpoint": {
            "address": {
                "envoy_internal_address": {"server_listener_name": listener, "endpoint_id": destination or name}
            }
        }
    }
    if destination is not None:
        endpoint["metadata"] = {"filter_metadata": {"envoy.filters.listener.original_dst": {"local": destination}}}
    passed = [{"kind": {"host": {}}, "name": "envoy.filters.listener.original_dst"}]
    raw = {"@type": f"{_EXTENSIONS}.transport_sockets.raw_buffer.v3.RawBuffer"}
    return {
        "name": name,
        "type": "STATIC",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "transport_socket": {
            "name": "envoy.transport_sockets.internal_upstream",
            "typed_config": {
                "@type": f"{_EXTENSIONS}.transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
                "passthrough_metadata": passed,
                "transport_socket": {"name": "envoy.transport_sockets.raw_buffer", "typed_config": raw},
            },
        },
    }


def _http_manager(
    name: str,
    routes: Sequence[Config],
    log: Path,
    extra: Config,
    http2: Config | None = None,
    common: Config | None = None,
) -> Config:
    router = {"name": "router", "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.router.v3.Router"}}
    host = {"name": "all", "domains": ["*"], "routes": list(routes), "request_headers_to_remove": ["x-peer"]}
    config: Config = {
        "@type": _HCM,
        "stat_prefix": name,
        "codec_type": "AUTO",
        "stream_idle_timeout": "0s",
        "common_http_protocol_options": {"idle_timeout": "3600s", **(common or {})},
        "http2_protocol_options": {"allow_connect": True, **(http2 or {})},
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "route_config": {"name": "all", "virtual_hosts": [host]},
        "http_filters": [router],
        "access_log": [_access_log(log)],
        **extra,
    }
    return {"name": "http", "typed_config": config}


def _access_log(log: Path) -> Config:
    return {
        "name": "file",
        "typed_config": {
            "@type": f"{_EXTENSIONS}.access_loggers.file.v3.FileAccessLog",
            "path": str(log),
            "log_format": {"json_format": _LOG_FORMAT},
        },
    }


def _tcp_proxy(cluster: str, authority: str = "") -> Config:
    config: Config = {
        "@type": f"{_EXTENSIONS}.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": cluster,
        "cluster": cluster,
        "idle_timeout": "0s",
    }
    if authority:
        config["tunneling_config"] = {"hostname": authority}
    return {"name": "tcp_proxy", "typed_config": config}


def _chain(filters: Sequence[Config], tls: Config | None = None) -> Config:
    chain: Config = {"filters": list(filters)}
    if tls is not None:
        chain["transport_socket"] = tls
    return {"filter_chains": [chain]}


def _http2(more: Config, common: Config) -> Config:
    options = {"allow_connect": True, **more}
    config: Config = {
        "@type": f"type.googleapis.com/{_HTTP2}",
        "explicit_http_config": {"http2_protocol_options": options},
        "common_http_protocol_options": {"idle_timeout": "3600s", **common},
    }
    # The breakers' default of 1024 would judge the test's own load.
    thresholds = [{"max_connections": 4096, "max_pending_requests": 4096, "max_requests": 4096}]
    return {"typed_extension_protocol_options": {_HTTP2: config}, "circuit_breakers": {"thresholds": thresholds}}


def _address(address: str, port: int) -> Config:
    return {"socket_address": {"address": address, "port_value": port}}


def _bootstrap(listeners: Sequence[Config], clusters: Sequence[Config]) -> Config:
    internal = {
        "name": "envoy.bootstrap.internal_listener",
        "typed_config": {"@type": f"{_EXTENSIONS}.bootstrap.internal_listener.v3.InternalListener"},
    }
    limit = {"@type": f"{_EXTENSIONS}.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"}
    monitor = {
        "name": "envoy.resource_monitors.global_downstream_max_connections",
        "typed_config": {**limit, "max_active_downstream_connections": 100000},
    }
    return {
        "static_resources": {"listeners": list(listeners), "clusters": list(clusters)},
        "bootstrap_extensions": [internal],
        "overload_manager": {"resource_monitors": [monitor]},
    }
