"""Pods and container statuses for the kubelet's tests."""

from __future__ import annotations

from typing import Any

from undermesh.lab.runtime.types import ContainerState, ContainerStatus

Object = dict[str, Any]
UID = "1b2c3d4e-0000-4000-8000-000000000001"
IMAGE = "busybox"


def pod(*containers: Object, init: tuple[Object, ...] = (), status: Object | None = None, **spec: Any) -> Object:
    """A pod called web in namespace shop; without containers it has one called app."""
    return {
        "metadata": {"name": "web", "namespace": "shop", "uid": UID, "labels": {"app": "web"}, "annotations": {}},
        "spec": {
            "containers": list(containers) or [container("app")],
            **({"initContainers": list(init)} if init else {}),
            **spec,
        },
        **({"status": status} if status else {}),
    }


def container(name: str, **fields: Any) -> Object:
    """A container with a command that does not matter."""
    return {"name": name, "image": IMAGE, "command": ["sleep", "1000"], **fields}


def sidecar(name: str, **fields: Any) -> Object:
    """An init container that keeps running."""
    return container(name, restartPolicy="Always", **fields)


def running(name: str, attempt: int = 0, sandbox: str = "s") -> ContainerStatus:
    """Its id is <name>-<attempt>."""
    return _status(name, attempt, sandbox, ContainerState.RUNNING, started_at=100.0)


def exited(name: str, code: int = 0, attempt: int = 0, sandbox: str = "s", at: float = 200.0) -> ContainerStatus:
    """As `running`, but it has ended."""
    return _status(
        name, attempt, sandbox, ContainerState.EXITED, started_at=100.0, finished_at=at, exit_code=code,
        reason="Completed" if code == 0 else "Error",
    )  # fmt: skip


def _status(name: str, attempt: int, sandbox: str, state: ContainerState, **more: Any) -> ContainerStatus:
    return ContainerStatus(f"{name}-{attempt}", sandbox, name, attempt, IMAGE, "sha256:1", state, **more)
