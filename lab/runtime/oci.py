"""The OCI runtime specification of a container, as containerd's CRI plugin writes it on a cgroup2 node.

Pure: what the node is like comes in as `NodeFacts`, where the container goes as `Placement`.
Sources: containerd pkg/cri/server/container_create_linux.go, oci/spec.go, oci/mounts.go.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from undermesh.lab.runtime import capabilities
from undermesh.lab.runtime.types import ContainerConfig, Mount, Resources, RuntimeFault, Security

Spec = dict[str, Any]

_MASKED = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_PERIOD = 100_000
_PROPAGATION = {"None": "rprivate", "HostToContainer": "rslave", "Bidirectional": "rshared"}


@dataclass(frozen=True)
class NodeFacts:
    """What the node allows."""

    controllers: frozenset[str]
    """Of cgroup.controllers: resources of others are left out."""
    capabilities: frozenset[str]
    """What the runtime may hand on."""
    lowest_oom_score: int = -1000
    """The lowest oom_score_adj that may be set."""
    devices: tuple[Mapping[str, object], ...] = ()
    """Every device of the node in OCI form, for privileged containers."""


@dataclass(frozen=True)
class ImageConfig:
    """What an image says about its containers."""

    entry_point: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = "/"
    user: int = 0
    mounts: tuple[Mount, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Where a container goes."""

    root: str
    """Its root file system."""
    cgroups_path: str
    hostname: str
    namespaces: Mapping[str, str] = field(default_factory=dict)
    """OCI type -> path of the one to join, empty: a new one; absent: the node's."""
    overlays: Mapping[str, str] = field(default_factory=dict)
    """Mount point -> options of an overlay, made before all other mounts."""
    shm: str = ""
    """Directory behind /dev/shm, which the containers of a pod share."""


def spec(config: ContainerConfig, image: ImageConfig, place: Placement, node: NodeFacts) -> Spec:
    """config.json of a container.

    Raises:
        RuntimeFault: what is asked for does not exist: a capability, a command, a mount propagation.
    """
    security = config.security
    namespaces = dict(place.namespaces)
    if not security.privileged:
        namespaces["cgroup"] = ""
    result: Spec = {
        "ociVersion": "1.0.2",
        "process": process(config, image, place, node),
        "root": {"path": place.root, "readonly": security.read_only_root},
        "mounts": mounts(config, image, place),
        "linux": {
            "cgroupsPath": place.cgroups_path,
            "namespaces": [{"type": t, "path": p} if p else {"type": t} for t, p in namespaces.items()],
            "resources": resources(config.resources, node),
            "rootfsPropagation": _root_propagation(config.mounts),
            **_exposure(security),
        },
    }
    if security.privileged:
        result["linux"]["devices"] = list(node.devices)
    return result


def process(config: ContainerConfig, image: ImageConfig, place: Placement, node: NodeFacts) -> Spec:
    """The `process` of a spec. Raises RuntimeFault."""
    security = config.security
    user = image.user if security.user is None else security.user
    result: Spec = {
        "terminal": config.tty,
        "user": {"uid": user, "gid": security.group or 0, "additionalGids": _groups(security)},
        "args": command(config, image),
        "env": environment(config, image, place.hostname),
        "cwd": config.working_dir or image.working_dir,
        "capabilities": _capabilities(config, node),
        "noNewPrivileges": not security.allow_privilege_escalation and not security.privileged,
        "oomScoreAdj": max(config.resources.oom_score_adj, node.lowest_oom_score),
    }
    return result


def command(config: ContainerConfig, image: ImageConfig) -> list[str]:
    """The command line: a pod's command replaces entry point and arguments, its args only the arguments.

    Raises:
        RuntimeFault: neither names anything.
    """
    if config.command:
        return [*config.command, *config.args]
    line = [*image.entry_point, *(config.args or image.args)]
    if not line:
        raise RuntimeFault(
            "CreateContainerError",
            f"container {config.name}: no command specified: image {config.image} has none; give the container one",
        )
    return line


def environment(config: ContainerConfig, image: ImageConfig, hostname: str) -> list[str]:
    """The image's variables, then the pod's; the last of a name counts and keeps the first's place."""
    values = dict((*image.env, ("HOSTNAME", hostname)))
    if config.tty:
        values["TERM"] = "xterm"
    return [f"{name}={value}" for name, value in {**values, **dict(config.env)}.items()]


def mounts(config: ContainerConfig, image: ImageConfig, place: Placement) -> list[Spec]:
    """Every mount, parents before children. Raises RuntimeFault."""
    own = {os.path.normpath(mount.target) for mount in config.mounts}
    fixed = [mount for mount in _standard(config, place) if mount["destination"] not in own]
    binds = [_bind(mount) for mount in (*image.mounts, *config.mounts)]
    return fixed + sorted(binds, key=lambda mount: str(mount["destination"]).count("/"))


def resources(wanted: Resources, node: NodeFacts) -> Spec:
    """Limits for which the node has a controller; rules of devices are `devices`'s."""
    result: Spec = {}
    if "cpu" in node.controllers:
        cpu: Spec = {}
        if wanted.cpu_shares:
            cpu["shares"] = wanted.cpu_shares
        if wanted.cpu_quota:
            cpu |= {"quota": wanted.cpu_quota, "period": _PERIOD}
        if cpu:
            result["cpu"] = cpu
    if "memory" in node.controllers and wanted.memory_limit:
        result["memory"] = {"limit": wanted.memory_limit, "swap": wanted.memory_limit}
    return result


def exec_process(spec: Spec, argv: Sequence[str], *, tty: bool) -> Spec:
    """The `process` for a further command in a container with this spec."""
    base: Spec = spec["process"]
    env = base["env"]
    if tty and not any(variable.startswith("TERM=") for variable in env):
        env = [*env, "TERM=xterm"]
    return {**base, "args": list(argv), "terminal": tty, "env": env}


def _standard(config: ContainerConfig, place: Placement) -> list[Spec]:
    privileged = config.security.privileged
    mode = "rw" if privileged else "ro"
    overlay_mode = ("ro",) if config.security.read_only_root else ()
    result = [
        _mount(target, "overlay", "overlay", *options.split(","), *overlay_mode)
        for target, options in place.overlays.items()
    ]
    result += [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", mode),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", mode),
    ]
    if place.shm:
        result.append(_mount("/dev/shm", "bind", place.shm, "rbind", "nosuid", "noexec", "nodev", "rw"))
    return result


def _mount(target: str, kind: str, source: str, *options: str) -> Spec:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def _bind(mount: Mount) -> Spec:
    if mount.propagation not in _PROPAGATION:
        raise RuntimeFault("CreateContainerError", f"mount {mount.target}: unknown propagation {mount.propagation!r}")
    access = "ro" if mount.read_only else "rw"
    target = os.path.normpath(mount.target)
    return _mount(target, "bind", mount.source, "rbind", _PROPAGATION[mount.propagation], access)


def _root_propagation(binds: Iterable[Mount]) -> str:
    wanted = {mount.propagation for mount in binds}
    return "rshared" if "Bidirectional" in wanted else "rslave" if "HostToContainer" in wanted else "rprivate"


def _exposure(security: Security) -> Spec:
    if security.privileged or security.unmasked_proc:
        return {"maskedPaths": [], "readonlyPaths": []}
    return {"maskedPaths": list(_MASKED), "readonlyPaths": list(_READ_ONLY)}


def _groups(security: Security) -> list[int]:
    """The container's own group is among the additional ones, as containerd has it since 1.6.18."""
    return list(dict.fromkeys((security.group or 0, *security.supplemental_groups)))


def _capabilities(config: ContainerConfig, node: NodeFacts) -> Spec:
    security = config.security
    try:
        wanted = capabilities.effective(
            security.add_capabilities, security.drop_capabilities, privileged=security.privileged
        )
    except ValueError as error:
        raise RuntimeFault("CreateContainerError", f"container {config.name}: {error}") from error
    names = [f"CAP_{name}" for name in capabilities.NAMES if name in wanted & node.capabilities]
    return dict.fromkeys(("bounding", "effective", "permitted"), names)
