"""Who may do what: the decision of RBAC over the stored roles and bindings.

https://kubernetes.io/docs/reference/access-authn-authz/rbac/
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.store import Store
from undermesh.lab.apiserver.user import MASTERS, User

_GROUP = "rbac.authorization.k8s.io"


@dataclass(frozen=True)
class Attributes:
    """What a request wants to do. `path` is set for requests that name no resource."""

    verb: str
    group: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""

    @property
    def full_resource(self) -> str:
        return f"{self.resource}/{self.subresource}" if self.subresource else self.resource


def _listed(wanted: str, allowed: list[str]) -> bool:
    return "*" in allowed or wanted in allowed


def _resource_listed(wanted: Attributes, allowed: list[str]) -> bool:
    if _listed(wanted.full_resource, allowed):
        return True
    return bool(wanted.subresource) and f"*/{wanted.subresource}" in allowed


def _path_listed(path: str, allowed: list[str]) -> bool:
    return any(path == entry or (entry.endswith("*") and path.startswith(entry[:-1])) for entry in allowed)


def rule_allows(rule: Object, wanted: Attributes) -> bool:
    """Whether one rule of a role allows the request."""
    if not _listed(wanted.verb, rule.get("verbs") or []):
        return False
    if wanted.path:
        return _path_listed(wanted.path, rule.get("nonResourceURLs") or [])
    names = rule.get("resourceNames") or []
    return (
        _listed(wanted.group, rule.get("apiGroups") or [])
        and _resource_listed(wanted, rule.get("resources") or [])
        and (not names or wanted.name in names)
    )


def subject_is(subject: Object, user: User, namespace: str) -> bool:
    """Whether a binding's subject means the user; `namespace` is that of the binding."""
    name = subject.get("name", "")
    match subject.get("kind"):
        case "User":
            return bool(user.name == name)
        case "Group":
            return name in user.groups
        case "ServiceAccount":
            return user.name == f"system:serviceaccount:{subject.get('namespace') or namespace}:{name}"
        case _:
            return False


class Rbac:
    """Decides from what is stored at that moment."""

    def __init__(self, store: Store, *, enabled: bool) -> None:
        self._store = store
        self.enabled = enabled

    def allows(self, user: User, wanted: Attributes) -> tuple[bool, str]:
        """The decision and its reason."""
        if not self.enabled:
            return True, ""
        if MASTERS in user.groups:
            return True, ""
        for rule, origin in self.rules(user, wanted.namespace):
            if rule_allows(rule, wanted):
                return True, f"RBAC: allowed by {origin}"
        return False, ""

    def rules(self, user: User, namespace: str) -> Iterator[tuple[Object, str]]:
        """Every rule that holds for the user in a namespace (cluster-wide ones only if empty), with its origin."""
        if MASTERS in user.groups:
            yield {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}, "membership in system:masters"
            yield {"verbs": ["*"], "nonResourceURLs": ["*"]}, "membership in system:masters"
        for stored in self._store.items(f"clusterrolebindings.{_GROUP}"):
            yield from self._bound(stored.obj, user, "")
        if namespace:
            for stored in self._store.items(f"rolebindings.{_GROUP}", namespace):
                yield from self._bound(stored.obj, user, namespace)

    def _bound(self, binding: Object, user: User, namespace: str) -> Iterator[tuple[Object, str]]:
        if not any(subject_is(subject, user, namespace) for subject in binding.get("subjects") or ()):
            return
        reference = binding["roleRef"]
        cluster = reference["kind"] == "ClusterRole"
        key = ("" if cluster else namespace, reference["name"])
        role = self._store.get(f"{'clusterroles' if cluster else 'roles'}.{_GROUP}", key)
        place = f"{namespace}/" if namespace else ""
        origin = (
            f'{binding["kind"]} "{place}{binding["metadata"]["name"]}" of {reference["kind"]} "{reference["name"]}"'
        )
        for rule in role.obj.get("rules") or () if role is not None else ():
            yield rule, origin


def refusal(user: User, wanted: Attributes) -> str:
    """The sentence of a 403, after the name of what was asked for."""
    if wanted.path:
        return f'User "{user.name}" cannot {wanted.verb} path "{wanted.path}"'
    place = f' in the namespace "{wanted.namespace}"' if wanted.namespace else " at the cluster scope"
    what = f'resource "{wanted.full_resource}" in API group "{wanted.group}"'
    return f'User "{user.name}" cannot {wanted.verb} {what}{place}'
