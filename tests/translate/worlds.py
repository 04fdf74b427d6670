"""Objects for the translation's tests, from the YAML that users write."""

import textwrap

from undermesh.api.authorization import AuthorizationPolicy
from undermesh.api.documents import parse
from undermesh.api.objects import Objects
from undermesh.controlplane.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, ResourceKey, Settings, Translation
from undermesh.proto import authorization_pb2 as rbac
from undermesh.proto import workload_pb2 as wds

SETTINGS = Settings()


def world(*texts: str) -> Objects:
    """All documents of all texts; fails on any problem."""
    located = []
    for text in texts:
        objects, problems = parse("test.yaml", textwrap.dedent(text).encode())
        assert not problems, [str(problem) for problem in problems]
        located += objects
    return Objects.of(entry.object for entry in located)


def policy(spec: str, *, name: str = "p", namespace: str = "shop", annotations: str = "{}") -> AuthorizationPolicy:
    """An AuthorizationPolicy with a spec in YAML flow or block form."""
    header = (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        f"metadata: {{name: {name}, namespace: {namespace}, annotations: {annotations}}}\nspec:\n"
    )
    objects = world(header + textwrap.indent(textwrap.dedent(spec), "  "))
    return objects.authorization_policies[next(iter(objects.authorization_policies))]


def peer_authentication(name: str, namespace: str, spec: str, *, created: str = "2026-01-01T00:00:00Z") -> str:
    """A PeerAuthentication as text, its spec in YAML flow form without the outer braces."""
    return (
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n"
        f"metadata: {{name: {name}, namespace: {namespace}, creationTimestamp: '{created}'}}\nspec: {{{spec}}}\n"
    )


def workload(translation: Translation, name: str, namespace: str = "shop") -> wds.Workload:
    key = ResourceKey(ADDRESS_TYPE, f"Kubernetes//Pod/{namespace}/{name}")
    return wds.Address.FromString(translation.resources[key].body).workload


def service(translation: Translation, name: str, namespace: str = "shop") -> wds.Service:
    key = ResourceKey(ADDRESS_TYPE, f"{namespace}/{name}.{namespace}.svc.cluster.local")
    return wds.Address.FromString(translation.resources[key].body).service


def authorization(translation: Translation, name: str) -> rbac.Authorization:
    return rbac.Authorization.FromString(translation.resources[ResourceKey(AUTHORIZATION_TYPE, name)].body)
