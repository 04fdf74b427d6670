"""What the runtime gets for a pod and for a container of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from undermesh.lab.client import Object
from undermesh.lab.kubelet import env, pods, qos, resolv, security
from undermesh.lab.kubelet.errors import ConfigError
from undermesh.lab.runtime import images
from undermesh.lab.runtime.types import ContainerConfig, Mount, PortMapping, SandboxConfig

TERMINATION_LOG = "/dev/termination-log"


@dataclass(frozen=True)
class Surroundings:
    """What a container finds: volumes by name, variables' sources, the node's memory in bytes."""

    volumes: Mapping[str, Path]
    facts: env.Facts
    memory: int


def sandbox_config(pod: Object, node: str) -> SandboxConfig:
    """The sandbox of a pod. Pure."""
    spec = pod["spec"]
    settings = spec.get("securityContext") or {}
    return SandboxConfig(
        namespace=pods.namespace(pod),
        name=pods.name(pod),
        uid=pods.uid(pod),
        hostname=pods.hostname(pod, node),
        cgroup_parent=qos.cgroup_parent(pod),
        host_network=pods.host_network(pod),
        host_pid=bool(spec.get("hostPID")),
        host_ipc=bool(spec.get("hostIPC")),
        share_process_namespace=bool(spec.get("shareProcessNamespace")),
        sysctls={sysctl["name"]: sysctl["value"] for sysctl in settings.get("sysctls") or ()},
        port_mappings=() if pods.host_network(pod) else _port_mappings(pod),
    )


def _port_mappings(pod: Object) -> tuple[PortMapping, ...]:
    return tuple(
        PortMapping(port["containerPort"], port["hostPort"], port.get("protocol") or "TCP", port.get("hostIP") or "")
        for container in pods.all_containers(pod)
        for port in container.get("ports") or ()
        if port.get("hostPort")
    )


def container_config(pod: Object, container: Object, attempt: int, around: Surroundings) -> ContainerConfig:
    """A container, with the files that only it has made on the node.

    Raises:
        ConfigError: a reference or security setting does not work out.
        OSError
    """
    image = images.lookup(container["image"])
    environment = env.environment(pod, container, around.facts)
    values = dict(environment)
    name = container["name"]
    return ContainerConfig(
        name=name,
        attempt=attempt,
        image=container["image"],
        command=tuple(env.expand(word, values) for word in container.get("command") or ()),
        args=tuple(env.expand(word, values) for word in container.get("args") or ()),
        env=environment,
        working_dir=container.get("workingDir") or "",
        mounts=(*_own_mounts(pod, container, attempt), *_volume_mounts(pod, container, values, around.volumes)),
        security=security.effective(pod, container, image.user if image else 0),
        resources=qos.resources(pod, container, around.memory),
        stdin=bool(container.get("stdin")),
        tty=bool(container.get("tty")),
        target=container.get("targetContainerName") or "",
        log_path=pods.log_directory(pod) / name / f"{attempt}.log",
    )


def write_pod_files(pod: Object, addresses: tuple[str, ...], node: str, dns_address: str, domain: str) -> None:
    """The pod's /etc/hosts and /etc/resolv.conf. Raises OSError."""
    directory = pods.directory(pod)
    directory.mkdir(parents=True, exist_ok=True)
    if pods.host_network(pod):
        hosts = resolv.host_network_hosts(pod, Path("/etc/hosts").read_text())
    else:
        hosts = resolv.hosts(pod, addresses, pods.hostname(pod, node), domain)
    (directory / "etc-hosts").write_text(hosts)
    of_node = resolv.parse(Path("/etc/resolv.conf").read_text())
    (directory / "resolv.conf").write_text(resolv.for_pod(pod, dns_address, domain, of_node).text())


def termination_log(pod: Object, name: str, attempt: int) -> Path:
    """The file behind a container's terminationMessagePath."""
    return pods.directory(pod) / "containers" / name / str(attempt)


def _own_mounts(pod: Object, container: Object, attempt: int) -> list[Mount]:
    log = termination_log(pod, container["name"], attempt)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    log.chmod(0o666)
    directory = pods.directory(pod)
    mounts = [
        Mount(str(directory / "etc-hosts"), "/etc/hosts"),
        Mount(str(directory / "resolv.conf"), "/etc/resolv.conf"),
        Mount(str(log), container.get("terminationMessagePath") or TERMINATION_LOG),
    ]
    theirs = {mount["mountPath"] for mount in container.get("volumeMounts") or ()}
    return [mount for mount in mounts if mount.target not in theirs]


def _volume_mounts(
    pod: Object, container: Object, values: Mapping[str, str], volumes: Mapping[str, Path]
) -> list[Mount]:
    mounts = []
    for mount in container.get("volumeMounts") or ():
        if mount["name"] not in volumes:
            raise ConfigError(f"container {container['name']}: there is no volume {mount['name']!r} to mount")
        source = _sub_path(container, mount, values, volumes[mount["name"]])
        mounts.append(
            Mount(
                source=str(source),
                target=mount["mountPath"],
                read_only=bool(mount.get("readOnly")),
                propagation=mount.get("mountPropagation") or "None",
            )
        )
    return mounts


def _sub_path(container: Object, mount: Object, values: Mapping[str, str], volume: Path) -> Path:
    """What of the volume is mounted. Raises ConfigError: outside of it."""
    part = mount.get("subPath") or ""
    if mount.get("subPathExpr"):
        part = env.expand(mount["subPathExpr"], values)
        if "$(" in part:
            raise ConfigError(f"container {container['name']}: subPathExpr {mount['subPathExpr']!r} has no value")
    if not part:
        return volume
    path = Path(os.path.realpath(volume / part))
    root = Path(os.path.realpath(volume))
    if part.startswith("/") or (path != root and root not in path.parents):
        raise ConfigError(f"container {container['name']}: subPath {part!r} is not within volume {mount['name']}")
    if not path.exists():
        path.mkdir(mode=0o750 if mount.get("readOnly") else 0o755, parents=True)
    return path
