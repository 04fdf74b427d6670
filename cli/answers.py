"""The agent's answers, as its HTTP API gives them; times are Unix times.

Unknown fields are ignored, so that an older command can ask a newer agent. Fields that protobuf leaves out when they
hold their default have that default here.
"""

import msgspec


class Process(msgspec.Struct, kw_only=True):
    """The agent itself; `started` in seconds."""

    pid: int
    started: float


class Draining(msgspec.Struct, kw_only=True):
    """A ztunnel that accepts nothing any more and serves what it has open; `since` in seconds."""

    pid: int
    build: str | None = None
    since: float = 0.0
    connections: int = 0


class Ztunnel(msgspec.Struct, kw_only=True):
    """The ztunnel that accepts, and those that drain; `instance` is random per process."""

    connected: bool
    instance: str | None = None
    build: str | None = None
    pid: int | None = None
    draining: list[Draining] = []


class HandOver(msgspec.Struct, kw_only=True):
    """POST /v1/ztunnel/hand-over: the pids of the ztunnel that drains now and of the one that accepts."""

    draining: int
    accepting: int


class ControlPlane(msgspec.Struct, kw_only=True):
    """The agent's connection to the control plane; `error` says why there is none."""

    connected: bool
    address: str | None = None
    error: str | None = None


class Pod(msgspec.Struct, kw_only=True):
    """One pod of the node: what it should be (`desired`), what it is (`state`), and why."""

    namespace: str
    name: str
    uid: str
    addresses: list[str]
    identity: str | None = None
    desired: str
    state: str
    reason: str | None = None
    captured_connections: int = 0
    inbound_connections: int = 0
    inbound_tunnels: int = 0
    outbound_tunnels: int = 0


class Status(msgspec.Struct, kw_only=True):
    """GET /v1/status."""

    node: str
    version: str
    kernel: str
    agent: Process
    ztunnel: Ztunnel
    control_plane: ControlPlane
    pods: list[Pod]


class Check(msgspec.Struct, kw_only=True):
    """One condition that undermesh needs; `next_step` on a check that is ok makes it a warning."""

    name: str
    ok: bool
    detail: str = ""
    next_step: str | None = None


class Checks(msgspec.Struct, kw_only=True):
    """GET /v1/check."""

    checks: list[Check]


class Connection(msgspec.Struct, kw_only=True):
    """One open connection as one ztunnel sees it; message Connection of proto/node.proto."""

    id: str = ""
    direction: str = ""
    lane: str = ""
    pod_uid: str = ""
    source: str = ""
    source_identity: str = ""
    source_workload: str = ""
    destination: str = ""
    destination_identity: str = ""
    destination_workload: str = ""
    destination_service: str = ""
    upstream: str = ""
    bytes_sent: int = 0
    bytes_received: int = 0
    opened_unix_ms: int = 0
    ztunnel_pid: int = 0
    draining: bool = False


class Connections(msgspec.Struct, kw_only=True):
    """GET /v1/connections."""

    connections: list[Connection]


class Policy(msgspec.Struct, kw_only=True):
    """One L4 policy that ztunnel holds; message Policy of proto/node.proto."""

    name: str = ""
    scope: str = ""
    action: str = ""
    dry_run: bool = False
    rules: int = 0
    version: str = ""
    denied_connections: int = 0
    cut_connections: int = 0
    matched_connections: int = 0
    audit: bool = False


class Policies(msgspec.Struct, kw_only=True):
    """GET /v1/policies."""

    policies: list[Policy]


class Certificate(msgspec.Struct, kw_only=True):
    """One certificate that ztunnel holds (message CertificateStatus of proto/node.proto), or should hold.

    `error` says why the newest attempt to get one failed; the times are 0 if there is none yet.
    """

    identity: str = ""
    serial: str = ""
    not_before_unix: int = 0
    not_after_unix: int = 0
    issuer: str = ""
    error: str = ""


class Certificates(msgspec.Struct, kw_only=True):
    """GET /v1/certs."""

    certs: list[Certificate]


class Workload(msgspec.Struct, kw_only=True):
    """One workload that ztunnel knows; message WorkloadStatus of proto/node.proto."""

    uid: str = ""
    namespace: str = ""
    name: str = ""
    service_account: str = ""
    addresses: list[str] = []
    node: str = ""
    protocol: str = ""
    healthy: bool = False


class Workloads(msgspec.Struct, kw_only=True):
    """GET /v1/workloads."""

    workloads: list[Workload]


class Service(msgspec.Struct, kw_only=True):
    """One service that ztunnel knows; message ServiceStatus of proto/node.proto."""

    name: str = ""
    namespace: str = ""
    addresses: list[str] = []
    endpoints: int = 0


class Services(msgspec.Struct, kw_only=True):
    """GET /v1/services."""

    services: list[Service]


class Judgement(msgspec.Struct, kw_only=True):
    """What one policy says of a connection; message PolicyJudgement of proto/node.proto."""

    name: str
    action: str
    scope: str = ""
    mode: str = "enforced"
    rule: int = 0
    misses: list[str] = []
    error: str = ""


class PodState(msgspec.Struct, kw_only=True):
    """A pod of the asked node: what it should be, what it is, and why."""

    name: str
    desired: str
    state: str
    reason: str | None = None


class Way(msgspec.Struct, kw_only=True):
    """One way that a connection may go; message Way of proto/node.proto."""

    lane: str = ""
    lane_reason: str = ""
    endpoint: str = ""
    workload: str = ""
    node: str = ""
    upstream: str = ""
    allowed: bool
    policy: str = ""
    reason: str = ""
    judged: bool = False
    policies: list[Judgement] = []
    capacity: int = 0
    pod: PodState | None = None


class Explanation(msgspec.Struct, kw_only=True):
    """GET /v1/explain; message Explanation of proto/node.proto."""

    node: str
    source_workload: str = ""
    source_address: str = ""
    source_identity: str = ""
    capture: str
    source_pod: PodState | None = None
    destination_address: str = ""
    destination_service: str = ""
    destination_workload: str = ""
    service_mode: str = ""
    ways: list[Way]


class BpfProgram(msgspec.Struct, kw_only=True):
    """One program; memory in bytes."""

    name: str
    id: int
    links: int
    runs: int
    run_time_ns: int
    memory: int


class BpfLink(msgspec.Struct, kw_only=True):
    """One link; `target` is a cgroup's id or a netns' inode, 0: detached."""

    name: str
    id: int
    program_id: int
    kind: str
    target: int


class BpfMap(msgspec.Struct, kw_only=True):
    """One map; `entries` is None where they cannot be counted. Memory in bytes."""

    name: str
    id: int
    type: str
    entries: int | None
    max_entries: int
    memory: int


class Bpf(msgspec.Struct, kw_only=True):
    """GET /v1/bpf."""

    pins: str
    stats_enabled: bool
    programs: list[BpfProgram]
    links: list[BpfLink]
    maps: list[BpfMap]
