"""PeerAuthentication to L4 policies that deny plaintext (reference/ztunnel.md 1.12 and 5.4).

A mode holds for a port, a workload, a namespace or the mesh: the nearest that is set counts, PERMISSIVE where none
is. Of several objects at one level the oldest counts. Where a pod's default is STRICT without exceptions it names one
policy of the root namespace; exceptions need a policy of their own, since nothing can be excepted from a DENY.

Deliberate differences from istiod: a selector in the root namespace selects in all namespaces, and an object that
cannot be read (a port that is none, ports without a selector) counts as STRICT.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from undermesh.api.core import Pod
from undermesh.api.identity import ObjectKey
from undermesh.api.meta import selects
from undermesh.api.peer_authentication import PeerAuthentication
from undermesh.controlplane.translate import values
from undermesh.controlplane.translate.faults import cause
from undermesh.controlplane.translate.settings import Settings
from undermesh.proto import authorization_pb2 as rbac

# Istio's names. No object can have them: they hold what no name may.
STATIC_STRICT: Final = "istio_converted_static_strict"
CONVERTED_PREFIX: Final = "converted_peer_authentication_"


@dataclass(frozen=True)
class Standing:
    """What became of one object.

    Attributes:
        valid: False if it could not be read and counts as STRICT.
        effective: False if an older one stands in its place.
        notes: For its author, one line each.
    """

    valid: bool = True
    effective: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Read:
    """One object, read.

    Attributes:
        strict: Its default; None: inherited.
        ports: Whether a port is strict.
    """

    key: ObjectKey
    labels: Mapping[str, str]
    strict: bool | None
    ports: Mapping[int, bool]
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PeerAuthentications:
    """All objects of a cluster, ready to be asked. Equal objects in any order give equal answers."""

    settings: Settings
    mesh: _Read | None = None
    namespaces: Mapping[str, _Read] = field(default_factory=dict)
    selecting: Mapping[str, tuple[_Read, ...]] = field(default_factory=dict)
    standings: Mapping[ObjectKey, Standing] = field(default_factory=dict)

    @classmethod
    def of(cls, objects: Iterable[PeerAuthentication], settings: Settings) -> "PeerAuthentications":
        """Reads the objects and settles which of them count."""
        by_age = sorted(objects, key=lambda o: (o.metadata.creation_timestamp, o.metadata.key))
        wide: dict[str, _Read] = {}
        selecting: defaultdict[str, list[_Read]] = defaultdict(list)
        standings: dict[ObjectKey, Standing] = {}
        for obj in by_age:
            read = _read_or_strict(obj)
            home = read.key.namespace
            if read.labels:
                selecting[home].append(read)
                elder = next((old for old in selecting[home][:-1] if old.labels == read.labels), None)
            else:
                elder = wide.setdefault(home, read)
            standings[read.key] = _standing(read, None if elder is read else elder)
        mesh = wide.pop(settings.root_namespace, None)
        return cls(settings, mesh, wide, {home: tuple(reads) for home, reads in selecting.items()}, standings)

    def names_for(self, pod: Pod) -> list[str]:
        """Names of the policies that the pod must carry; each is among `authorizations`."""
        strict = self._inherited(pod.metadata.namespace)
        read = self._selecting(pod)
        if read is not None:
            strict = strict if read.strict is None else read.strict
            if _exceptions(read, strict):
                return [str(_converted_key(read, strict))]
        return [str(self._static_key)] if strict else []

    def authorizations(self) -> dict[ObjectKey, rbac.Authorization]:
        """Every policy that a pod of any namespace may carry."""
        found: dict[ObjectKey, rbac.Authorization] = {}
        if self.standings:
            found[self._static_key] = _authorization(self._static_key, [[_PLAINTEXT]])
        for reads in self.selecting.values():
            for read in reads:
                for strict in (True, False) if read.strict is None else (read.strict,):
                    if ports := _exceptions(read, strict):
                        key = _converted_key(read, strict)
                        found[key] = _with_exceptions(key, strict, ports)
        return found

    @property
    def _static_key(self) -> ObjectKey:
        return ObjectKey(self.settings.root_namespace, STATIC_STRICT)

    def _inherited(self, namespace: str) -> bool:
        levels = (self.namespaces.get(namespace), self.mesh)
        return next((level.strict for level in levels if level is not None and level.strict is not None), False)

    def _selecting(self, pod: Pod) -> _Read | None:
        """The oldest of the pod's own namespace, else of the root namespace."""
        homes = (pod.metadata.namespace, self.settings.root_namespace)
        candidates = (read for home in homes for read in self.selecting.get(home, ()))
        return next((read for read in candidates if selects(read.labels, pod.metadata.labels)), None)


_PLAINTEXT: Final = rbac.Match(not_principals=[rbac.StringMatch(presence=rbac.Empty())])


def _read_or_strict(obj: PeerAuthentication) -> _Read:
    """One that our code cannot read means what one with a mistake in it means."""
    try:
        return _read(obj)
    except Exception as error:  # noqa: BLE001
        labels = obj.spec.selector.match_labels if obj.spec.selector else {}
        fault = f"it cannot be translated ({cause(error)}), a fault of undermesh's: report it"
        return _Read(obj.metadata.key, labels, True, {}, (fault,), ())


def _read(obj: PeerAuthentication) -> _Read:
    spec = obj.spec
    labels = spec.selector.match_labels if spec.selector else {}
    ports: dict[int, bool] = {}
    faults: list[str] = []
    notes: list[str] = []
    for text, entry in spec.port_level_mtls.items():
        try:
            number = values.port(str(text))
        except ValueError as error:
            faults.append(f"spec.portLevelMtls: {error}, got {str(text)[:32]!r}")
            continue
        if entry.mode != "UNSET":
            ports[number] = entry.mode == "STRICT"
    if spec.port_level_mtls and not labels:
        faults.append("spec.portLevelMtls: needs a selector with labels")
    if "DISABLE" in {spec.mtls.mode, *(entry.mode for entry in spec.port_level_mtls.values())}:
        notes.append("DISABLE means PERMISSIVE here: what comes through a tunnel is still taken")
    strict = None if spec.mtls.mode == "UNSET" else spec.mtls.mode == "STRICT"
    if faults:
        strict, ports = True, {}
    return _Read(obj.metadata.key, labels, strict, ports, tuple(faults), tuple(notes))


def _standing(read: _Read, elder: _Read | None) -> Standing:
    if elder is not None:
        note = f"{elder.key} is older and selects the same: this one has no effect"
        return Standing(not read.faults, effective=False, notes=(note, *read.faults))
    if read.faults:
        return Standing(valid=False, notes=("; ".join(read.faults) + "; until this is corrected it means STRICT",))
    return Standing(notes=read.notes)


def _exceptions(read: _Read, strict: bool) -> list[int]:
    """The ports whose mode is not the default."""
    return sorted(port for port, mode in read.ports.items() if mode is not strict)


def _converted_key(read: _Read, strict: bool) -> ObjectKey:
    """With both defaults a policy of the root namespace may be carried, by pods of different namespaces."""
    suffix = "" if read.strict is not None else ("_strict" if strict else "_permissive")
    return ObjectKey(read.key.namespace, f"{CONVERTED_PREFIX}{read.key.name}{suffix}")


def _with_exceptions(key: ObjectKey, strict: bool, ports: list[int]) -> rbac.Authorization:
    if strict:
        return _authorization(key, [[rbac.Match(not_destination_ports=ports), _PLAINTEXT]])
    matches = [rbac.Match(destination_ports=[port], not_principals=_PLAINTEXT.not_principals) for port in ports]
    return _authorization(key, [[match] for match in matches])


def _authorization(key: ObjectKey, rules: list[list[rbac.Match]]) -> rbac.Authorization:
    """A DENY. Each rule is a list of ANDed clauses of one match."""
    return rbac.Authorization(
        name=key.name,
        namespace=key.namespace,
        scope=rbac.WORKLOAD_SELECTOR,
        action=rbac.DENY,
        rules=[rbac.Rule(clauses=[rbac.Clause(matches=[match]) for match in clauses]) for clauses in rules],
    )
