"""Who makes a request, and how it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

AUTHENTICATED = "system:authenticated"
MASTERS = "system:masters"


@dataclass(frozen=True)
class User:
    """An authenticated (or anonymous) client."""

    name: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def as_object(self) -> dict[str, object]:
        """As reviews show it."""
        found: dict[str, object] = {"username": self.name, "groups": list(self.groups)}
        if self.uid:
            found["uid"] = self.uid
        if self.extra:
            found["extra"] = {key: list(values) for key, values in self.extra.items()}
        return found


ANONYMOUS = User("system:anonymous", ("system:unauthenticated",))
SERVER = User("system:apiserver", (MASTERS, AUTHENTICATED))


@dataclass
class Write:
    """How a write is made: by whom, under which manager's name, and what the query asks for."""

    user: User = SERVER
    manager: str = "kube-apiserver"
    subresource: str = ""
    dry_run: bool = False
    validation: str = "Ignore"
    """fieldValidation: Ignore, Warn or Strict."""
    force: bool = False
    warnings: list[str] = field(default_factory=list)
