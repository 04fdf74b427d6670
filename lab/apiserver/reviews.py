"""Kinds that are questions: TokenReview, the access reviews, and TokenRequest of a service account."""

from __future__ import annotations

import time
from collections.abc import Callable

from undermesh.lab.apiserver import errors, validation
from undermesh.lab.apiserver.authn import Authenticator
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.rbac import Attributes, Rbac
from undermesh.lab.apiserver.store import Store
from undermesh.lab.apiserver.tokens import SHORTEST, Binding, TokenError, Tokens
from undermesh.lab.apiserver.user import User


def _attributes(spec: Object) -> Attributes:
    if "nonResourceAttributes" in spec:
        found = spec["nonResourceAttributes"]
        return Attributes(found.get("verb", ""), path=found.get("path", ""))
    found = spec.get("resourceAttributes") or {}
    return Attributes(
        found.get("verb", ""),
        found.get("group", ""),
        found.get("resource", ""),
        found.get("subresource", ""),
        found.get("namespace", ""),
        found.get("name", ""),
    )


class Reviews:
    """Answers each review by its kind."""

    def __init__(self, store: Store, rbac: Rbac, authenticator: Authenticator, tokens: Tokens) -> None:
        self._store = store
        self._rbac = rbac
        self._authenticator = authenticator
        self._tokens = tokens
        self._answers: dict[str, Callable[[Object, User], Object]] = {
            "TokenReview": self._token,
            "SelfSubjectReview": self._who,
            "SubjectAccessReview": self._access,
            "LocalSubjectAccessReview": self._access,
            "SelfSubjectAccessReview": self._own_access,
            "SelfSubjectRulesReview": self._own_rules,
        }

    def answer(self, kind: Kind, body: Object, user: User) -> Object:
        """The review with its status. Raises ApiError."""
        spec = body.get("spec") or {}
        answer = self._answers[kind.kind](spec, user)
        return {**body, "metadata": {**(body.get("metadata") or {}), "creationTimestamp": None}, "status": answer}

    def _token(self, spec: Object, user: User) -> Object:
        try:
            found, audiences = self._authenticator.review(spec.get("token", ""), spec.get("audiences") or [])
        except TokenError as error:
            return {"authenticated": False, "user": {}, "error": str(error)}
        return {"authenticated": True, "user": found.as_object(), "audiences": audiences}

    def _who(self, spec: Object, user: User) -> Object:
        return {"userInfo": user.as_object()}

    def _access(self, spec: Object, user: User) -> Object:
        groups = tuple(spec.get("groups") or ())
        extra = {key: tuple(values) for key, values in (spec.get("extra") or {}).items()}
        return self._decision(User(spec.get("user", ""), groups, spec.get("uid", ""), extra), spec)

    def _own_access(self, spec: Object, user: User) -> Object:
        return self._decision(user, spec)

    def _decision(self, user: User, spec: Object) -> Object:
        if "resourceAttributes" not in spec and "nonResourceAttributes" not in spec:
            cause = validation.invalid_value(
                "spec.resourceAttributes",
                None,
                "exactly one of nonResourceAttributes or resourceAttributes must be specified",
            )
            raise errors.invalid("authorization.k8s.io", "SubjectAccessReview", "", [cause])
        allowed, reason = self._rbac.allows(user, _attributes(spec))
        return {"allowed": allowed, "reason": reason} if reason else {"allowed": allowed}

    def _own_rules(self, spec: Object, user: User) -> Object:
        if not self._rbac.enabled:
            everything: Object = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}
            return {
                "resourceRules": [everything],
                "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
                "incomplete": False,
            }
        rules = [rule for rule, _ in self._rbac.rules(user, spec.get("namespace", ""))]
        return {
            "resourceRules": [rule for rule in rules if "resources" in rule],
            "nonResourceRules": [rule for rule in rules if "nonResourceURLs" in rule],
            "incomplete": False,
        }

    def request_token(self, namespace: str, name: str, body: Object) -> Object:
        """TokenRequest: a token for the account. Raises ApiError 404, 409, 422."""
        account = self._store.get("serviceaccounts", (namespace, name))
        if account is None:
            raise errors.not_found("", "serviceaccounts", name)
        spec = body.get("spec") or {}
        lifetime = spec.get("expirationSeconds") or 3600
        if lifetime < SHORTEST:
            cause = validation.invalid_value(
                "spec.expirationSeconds", lifetime, "may not specify a duration less than 10 minutes"
            )
            raise errors.invalid("authentication.k8s.io", "TokenRequest", "", [cause])
        bound, node = self._bound(namespace, name, spec.get("boundObjectRef"))
        audiences = spec.get("audiences") or [self._tokens.audience]
        token = self._tokens.issue(account.obj, audiences, lifetime, bound, node)
        expiry = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + lifetime))
        metadata = {"name": name, "namespace": namespace, "creationTimestamp": None}
        return {
            "kind": "TokenRequest",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": metadata,
            "spec": {**spec, "audiences": audiences, "expirationSeconds": lifetime},
            "status": {"token": token, "expirationTimestamp": expiry},
        }

    def _bound(self, namespace: str, account: str, reference: Object | None) -> tuple[Binding | None, Object | None]:
        if not reference:
            return None, None
        resource = {"Pod": "pods", "Node": "nodes", "Secret": "secrets"}.get(reference.get("kind", ""))
        if resource is None:
            cause = validation.unsupported("spec.boundObjectRef.kind", reference.get("kind"), ("Pod", "Node", "Secret"))
            raise errors.invalid("authentication.k8s.io", "TokenRequest", "", [cause])
        stored = self._store.get(resource, ("" if resource == "nodes" else namespace, reference.get("name", "")))
        if stored is None:
            raise errors.not_found("", resource, reference.get("name", ""))
        uid = stored.obj["metadata"]["uid"]
        if reference.get("uid", uid) != uid:
            why = (
                f"the UID in the bound object reference ({reference['uid']}) does not match the UID in record ({uid}). "
                "The object might have been deleted and then recreated"
            )
            raise errors.conflict("", resource, reference["name"], why)
        node = None
        if resource == "pods":
            if stored.obj["spec"].get("serviceAccountName") != account:
                cause = validation.invalid_value(
                    "spec.boundObjectRef.name", reference["name"], f"the pod does not use service account {account}"
                )
                raise errors.invalid("authentication.k8s.io", "TokenRequest", "", [cause])
            found = self._store.get("nodes", ("", stored.obj["spec"].get("nodeName", "")))
            node = found.obj if found is not None else None
        return Binding(reference["kind"], reference["name"], uid), node
