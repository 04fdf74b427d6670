"""The effective security context of a container: its own settings before the pod's. Pure.

Source: kubernetes pkg/securitycontext/util.go, pkg/kubelet/kuberuntime/security_context.go.
"""

from __future__ import annotations

from typing import Any

from undermesh.lab.client import Object
from undermesh.lab.kubelet import pods
from undermesh.lab.kubelet.errors import ConfigError
from undermesh.lab.runtime.types import Security


def effective(pod: Object, container: Object, image_user: int = 0) -> Security:
    """Merge pod and container.

    Args:
        image_user: who the container is if neither says.

    Raises:
        ConfigError: runAsNonRoot forbids the user.
    """
    of_pod = pod["spec"].get("securityContext") or {}
    own = container.get("securityContext") or {}

    def setting(key: str) -> Any:
        value = own.get(key)
        return of_pod.get(key) if value is None else value

    user = setting("runAsUser")
    _check_non_root(pod, container, setting("runAsNonRoot"), user, image_user)
    capabilities = own.get("capabilities") or {}
    groups = list(of_pod.get("supplementalGroups") or ())
    if of_pod.get("fsGroup") is not None:
        groups.append(of_pod["fsGroup"])
    return Security(
        user=user,
        group=setting("runAsGroup"),
        supplemental_groups=tuple(dict.fromkeys(groups)),
        privileged=bool(own.get("privileged")),
        add_capabilities=_names(capabilities.get("add")),
        drop_capabilities=_names(capabilities.get("drop")),
        allow_privilege_escalation=own.get("allowPrivilegeEscalation") is not False,
        read_only_root=bool(own.get("readOnlyRootFilesystem")),
        unmasked_proc=own.get("procMount") == "Unmasked",
    )


def _names(capabilities: list[str] | None) -> tuple[str, ...]:
    return tuple(name.upper().removeprefix("CAP_") for name in capabilities or ())


def _check_non_root(pod: Object, container: Object, non_root: bool | None, user: int | None, image_user: int) -> None:
    if not non_root:
        return
    where = f'(pod: "{pods.full_name(pod)}", container: {container["name"]})'
    if user == 0:
        raise ConfigError(f"container's runAsUser breaks non-root policy {where}")
    if user is None and image_user == 0:
        raise ConfigError(f"container has runAsNonRoot and image will run as root {where}")
