"""What happens to a body before it is stored: decoding by schema, defaults, and rules that span objects."""

from __future__ import annotations

import secrets
from typing import Any

from undermesh.lab.apiserver import defaults, errors, limits, structural, validation
from undermesh.lab.apiserver.addresses import Addresses, AllocationError
from undermesh.lab.apiserver.catalog import Catalog, Custom
from undermesh.lab.apiserver.decode import Decoder, strict_error
from undermesh.lab.apiserver.definitions import check_definition, complete_definition
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.quota import Quotas
from undermesh.lab.apiserver.store import Store
from undermesh.lab.apiserver.user import Write

_SYSTEM_FIELDS = frozenset({"apiVersion", "kind", "metadata"})


class Admission:
    """Prepares objects of every kind."""

    def __init__(self, store: Store, catalog: Catalog, addresses: Addresses, *, token_volumes: bool) -> None:
        self._store = store
        self._catalog = catalog
        self._addresses = addresses
        self._token_volumes = token_volumes
        self.quotas = Quotas(store)

    def decode(self, kind: Kind, body: Any, write: Write, *, fill: bool = True) -> Object:
        """The body as an object of its own, checked against the schema. Raises ApiError 400.

        Without `fill`, a custom resource gets no defaults: what is applied is only what the applier wrote.
        """
        if not isinstance(body, dict):
            raise errors.bad_request("the body of the request is not an object")
        body = {"apiVersion": kind.api_version, "kind": kind.kind, **body}
        if body["apiVersion"] != kind.api_version:
            raise errors.bad_request(
                f"the API version in the data ({body['apiVersion']}) does not match "
                f"the expected API version ({kind.api_version})"
            )
        if body["kind"] != kind.kind:
            raise errors.bad_request(
                f'{kind.kind} in version "{kind.version}" cannot be handled as a {kind.kind}: no kind "{body["kind"]}"'
            )
        custom = self._catalog.custom(kind)
        obj, unknown = (
            self._decode_custom(kind, custom, body, fill=fill)
            if custom is not None
            else self._decode_built_in(kind, body)
        )
        if unknown and write.validation == "Strict":
            raise strict_error(kind, unknown)
        if unknown and write.validation == "Warn":
            write.warnings += [f'unknown field "{path}"' for path in unknown]
        obj.setdefault("metadata", {})
        return obj

    def _decode_built_in(self, kind: Kind, body: Object) -> tuple[Object, list[str]]:
        decoder = Decoder(kind)
        obj: Object = decoder.decode(body, self._catalog.node(kind))
        return obj, decoder.unknown

    def _decode_custom(self, kind: Kind, custom: Custom, body: Object, *, fill: bool) -> tuple[Object, list[str]]:
        unknown: list[str] = []
        metadata = Decoder(kind)
        found = metadata.decode(body.get("metadata") or {}, custom.node.child("metadata"))
        unknown += [f"metadata.{path}" for path in metadata.unknown]
        rest = {key: value for key, value in body.items() if key not in _SYSTEM_FIELDS}
        if not custom.preserves_unknown:
            rest = structural.prune(rest, custom.schema, "", unknown)
        rest = structural.drop_nulls(rest, custom.schema)
        if fill:
            rest = structural.default(rest, custom.schema)
        return {"apiVersion": body["apiVersion"], "kind": body["kind"], "metadata": found, **rest}, unknown

    def namespace_accepts(self, kind: Kind, namespace: str, name: str) -> None:
        """Raises ApiError 404 when the namespace is not there, 403 when it is going away."""
        found = self._store.get("namespaces", ("", namespace))
        if found is None:
            raise errors.not_found("", "namespaces", namespace)
        if found.obj["metadata"].get("deletionTimestamp"):
            text = f"unable to create new content in namespace {namespace} because it is being terminated"
            cause = errors.Cause(
                "NamespaceTerminating", f"namespace {namespace} is being terminated", "metadata.namespace"
            )
            raise errors.forbidden(kind.group, kind.plural, name, text, [cause])

    def prepare_create(self, kind: Kind, obj: Object) -> None:
        """Fill in a new object. Raises ApiError."""
        custom = self._catalog.custom(kind)
        if kind.has_status and (custom is not None or kind.resource != "nodes"):
            obj.pop("status", None)
        if custom is not None:
            return
        for part in ("spec",) if "spec" in self._catalog.node(kind).fields else ():
            if kind.resource not in ("events", "leases.coordination.k8s.io"):
                obj.setdefault(part, {})
        self._default(kind, obj)
        match kind.resource:
            case "pods":
                self._admit_pod(obj)
            case "services":
                self._allocate(kind, obj, None)
            case "limitranges":
                limits.complete(obj)
            case "customresourcedefinitions.apiextensions.k8s.io":
                complete_definition(obj)
        status = defaults.initial_status(kind.resource, obj)
        if status is not None:
            obj["status"] = status

    def prepare_update(self, kind: Kind, obj: Object, old: Object, subresource: str) -> None:
        """Fill in an object that will replace `old`. Raises ApiError."""
        if self._catalog.custom(kind) is not None or subresource == "status":
            return
        if kind.resource == "pods":
            for key in ("serviceAccountName", "serviceAccount", "priority", "preemptionPolicy", "enableServiceLinks"):
                if key in old["spec"]:
                    obj["spec"].setdefault(key, old["spec"][key])
        self._default(kind, obj)
        if kind.resource == "services":
            self._allocate(kind, obj, old)
        elif kind.resource == "customresourcedefinitions.apiextensions.k8s.io":
            complete_definition(obj)

    def _default(self, kind: Kind, obj: Object) -> None:
        fill = defaults.DEFAULTS.get(kind.resource)
        if fill is None:
            return
        try:
            fill(obj)
        except (KeyError, AttributeError, TypeError):
            # Something that defaults build on is missing; validation says what.
            return

    def _admit_pod(self, obj: Object) -> None:
        metadata, spec = obj["metadata"], obj["spec"]
        name = spec.get("serviceAccountName", "default")
        account = self._store.get("serviceaccounts", (metadata["namespace"], name))
        if account is None:
            why = f'error looking up service account {metadata["namespace"]}/{name}: serviceaccount "{name}" not found'
            raise errors.forbidden("", "pods", metadata["name"], why)
        limits.fill(obj, self._ranges(metadata["namespace"]))
        if not spec.get("imagePullSecrets") and account.obj.get("imagePullSecrets"):
            spec["imagePullSecrets"] = account.obj["imagePullSecrets"]
        wanted = spec.get("automountServiceAccountToken", account.obj.get("automountServiceAccountToken", True))
        if self._token_volumes and wanted:
            defaults.token_volume(obj, secrets.token_hex(3)[:5])

    def admit_create(self, kind: Kind, obj: Object) -> None:
        """What the namespace's LimitRanges and ResourceQuotas say of a valid new object. Raises ApiError 403."""
        if kind.resource == "pods":
            metadata = obj["metadata"]
            found = limits.problems(obj, self._ranges(metadata["namespace"]))
            if found:
                text = found[0] if len(found) == 1 else f"[{', '.join(found)}]"
                raise errors.forbidden("", "pods", metadata["name"], text)
        self.quotas.admit(kind, obj)

    def _ranges(self, namespace: str) -> list[Object]:
        return [stored.obj for stored in self._store.items("limitranges", namespace)]

    def _allocate(self, kind: Kind, obj: Object, old: Object | None) -> None:
        try:
            self._addresses.complete(obj, old)
        except AllocationError as error:
            raise errors.invalid(kind.group, kind.kind, obj["metadata"]["name"], error.causes) from error

    def confine(self, kind: Kind, old: Object, new: Object, subresource: str) -> Object:
        """`new` as far as the request's subresource may change the object."""
        custom = self._catalog.custom(kind)
        if subresource == "status":
            metadata = dict(old["metadata"])
            metadata["managedFields"] = new["metadata"].get("managedFields", metadata.get("managedFields", []))
            if custom is None:
                for key in ("labels", "annotations"):
                    if key in new["metadata"]:
                        metadata[key] = new["metadata"][key]
            result = {**old, "metadata": metadata}
            result.pop("status", None)
            return {**result, "status": new["status"]} if "status" in new else result
        if subresource == "ephemeralcontainers":
            added = (new.get("spec") or {}).get("ephemeralContainers") or []
            metadata = {**old["metadata"], "managedFields": new["metadata"].get("managedFields", [])}
            return {**old, "metadata": metadata, "spec": {**old["spec"], "ephemeralContainers": added}}
        if subresource == "finalize":
            return {
                **old,
                "spec": {**old.get("spec", {}), "finalizers": (new.get("spec") or {}).get("finalizers") or []},
                "metadata": dict(old["metadata"]),
            }
        if kind.has_status:
            new.pop("status", None)
            if "status" in old:
                new["status"] = old["status"]
        return new

    def validate(self, kind: Kind, obj: Object, old: Object | None, subresource: str = "") -> None:
        """Raises ApiError 422 with every cause."""
        custom = self._catalog.custom(kind)
        if custom is not None:
            rest = {key: value for key, value in obj.items() if key not in _SYSTEM_FIELDS}
            causes = validation.metadata(kind, obj) + structural.validate(rest, custom.schema)
        elif subresource in ("status", "finalize"):
            return
        else:
            causes = validation.validate(kind, obj, old)
            if kind.kind == "CustomResourceDefinition":
                causes += check_definition(obj)
        if causes:
            raise errors.invalid(kind.group, kind.kind, obj["metadata"].get("name", ""), causes)
