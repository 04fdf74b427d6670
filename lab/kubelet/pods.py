"""Reading a pod: what every part of the kubelet asks of its JSON. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from undermesh.lab.client import Object

ROOT = Path("/var/lib/kubelet/pods")
LOGS = Path("/var/log/pods")


def uid(pod: Object) -> str:
    return str(pod["metadata"]["uid"])


def namespace(pod: Object) -> str:
    return str(pod["metadata"]["namespace"])


def name(pod: Object) -> str:
    return str(pod["metadata"]["name"])


def full_name(pod: Object) -> str:
    """As the kubelet names a pod in messages: name_namespace(uid)."""
    return f"{name(pod)}_{namespace(pod)}({uid(pod)})"


def containers(pod: Object) -> list[Object]:
    """The regular containers."""
    return list(pod["spec"]["containers"])


def init_containers(pod: Object) -> list[Object]:
    """Init containers, sidecars included, in their order."""
    return list(pod["spec"].get("initContainers") or ())


def ephemeral_containers(pod: Object) -> list[Object]:
    """Those that `kubectl debug` added."""
    return list(pod["spec"].get("ephemeralContainers") or ())


def all_containers(pod: Object) -> list[Object]:
    return init_containers(pod) + containers(pod) + ephemeral_containers(pod)


def is_sidecar(container: Object) -> bool:
    """Whether an init container keeps running beside the pod's own containers."""
    return container.get("restartPolicy") == "Always"


def restart_policy(pod: Object) -> str:
    return str(pod["spec"].get("restartPolicy") or "Always")


def host_network(pod: Object) -> bool:
    return bool(pod["spec"].get("hostNetwork"))


def deleting(pod: Object) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def finished(pod: Object) -> bool:
    """Whether its last reported phase is a final one."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def grace(pod: Object) -> int:
    """Seconds between SIGTERM and SIGKILL, at least 1 as the kubelet has it."""
    asked = pod["metadata"].get("deletionGracePeriodSeconds")
    if asked is None:
        asked = pod["spec"].get("terminationGracePeriodSeconds", 30)
    return max(1, int(asked))


def hostname(pod: Object, node: str) -> str:
    """Its host name: the node's with hostNetwork; cut at 63 characters as the kubelet does."""
    if host_network(pod):
        return node
    return str(pod["spec"].get("hostname") or name(pod)[:63].rstrip("-."))


def directory(pod: Object) -> Path:
    """What the kubelet keeps on the node for the pod."""
    return ROOT / uid(pod)


def log_directory(pod: Object) -> Path:
    return LOGS / f"{namespace(pod)}_{name(pod)}_{uid(pod)}"


def seconds_of(text: str) -> float:
    """A time of the API as seconds since the epoch."""
    return datetime.fromisoformat(text).timestamp()


def time_of(seconds: float) -> str:
    """Seconds since the epoch as a time of the API, which knows whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
