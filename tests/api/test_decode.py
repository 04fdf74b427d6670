from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undermesh.api.core import Pod
from undermesh.api.decode import DecodeError, decode, unwrap
from undermesh.api.documents import parse
from undermesh.api.objects import KINDS

POLICY = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p"}}


def pod(**parts: Any) -> dict[str, Any]:
    metadata = {"name": "web", "namespace": "shop", "uid": "u1", **parts.pop("metadata", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, **parts}


def service(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": spec}


def test_unknown_fields_and_nulls_are_ignored_as_kubernetes_does() -> None:
    raw = pod(
        metadata={"creationTimestamp": None, "labels": None, "managedFields": [{"x": 1}]},
        spec={"containers": [{"name": "app", "image": "x", "ports": None}], "nodeName": "n1"},
        status=None,
    )
    decoded = decode(raw)
    assert isinstance(decoded, Pod)
    assert decoded.spec.node_name == "n1"
    assert decoded.spec.service_account_name == "default"


def test_a_namespaced_object_without_namespace_belongs_to_default_and_others_to_none() -> None:
    assert decode(service({})).metadata.namespace == "default"
    raw = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "namespace": "x"}}
    assert decode(raw).metadata.namespace == ""


BAD: list[tuple[object, str]] = [
    (None, "expected an object with kind and metadata, got nothing"),
    ([], "expected an object with kind and metadata, got a list"),
    ("x", "expected an object with kind and metadata, got text"),
    ({}, "object: kind: expected the name of a kind"),
    (
        {"kind": "AuthorisationPolicy", "metadata": {"name": "p"}},
        "AuthorisationPolicy p: kind: unknown kind: remove the object, or use one of " + ", ".join(KINDS),
    ),
    ({**pod(), "apiVersion": "v2"}, "Pod shop/web: apiVersion: expected v1, got 'v2'"),
    (
        {**POLICY, "apiVersion": "security.istio.io/v2"},
        "AuthorizationPolicy p: apiVersion: expected security.istio.io/v1 or security.istio.io/v1beta1, "
        "got 'security.istio.io/v2'",
    ),
    ({"apiVersion": "v1", "kind": "Pod"}, "Pod: missing the field metadata"),
    (pod(metadata={"uid": ""}), "Pod shop/web: metadata.uid is missing: a pod is known by its uid"),
    (
        pod(metadata={"name": "a/b"}),
        "Pod shop/a/b: metadata.name: expected a name of lower-case letters, digits, '-' and '.', got 'a/b'",
    ),
    (
        pod(metadata={"name": "web\n"}),
        "Pod shop/web: metadata.name: expected a name of lower-case letters, digits, '-' and '.', got 'web\\n'",
    ),
    (
        pod(metadata={"namespace": "a/sa/b"}),
        "Pod a/sa/b/web: metadata.namespace: expected a namespace name of lower-case letters, digits and '-', "
        "got 'a/sa/b'",
    ),
    (
        pod(spec={"serviceAccountName": "x/sa/admin"}),
        "Pod shop/web: spec.serviceAccountName: expected a name of lower-case letters, digits, '-' and '.', "
        "got 'x/sa/admin'",
    ),
    (
        pod(metadata={"labels": {"ok": "x", "version": 1.0}}),
        "Pod shop/web: metadata.labels.version: expected text, got a number: put it in quotes",
    ),
    (
        pod(metadata={"labels": {1: "x"}}),
        "Pod shop/web: metadata.labels: expected text for each key: put the keys in quotes",
    ),
    (
        pod(metadata={"labels": {"app": None}}),
        "Pod shop/web: metadata.labels.app: expected text, got nothing",
    ),
    (pod(spec={"hostNetwork": "yes"}), "Pod shop/web: spec.hostNetwork: expected true or false, got text"),
    (
        pod(status={"phase": "running"}),
        "Pod shop/web: status.phase: expected Failed or Pending or Running or Succeeded or Unknown, got 'running'",
    ),
    (
        pod(status={"podIPs": [{"ip": "10.1.0.1"}, {"ip": "10.1.0"}]}),
        "Pod shop/web: status.podIPs[1]: '10.1.0' does not appear to be an IPv4 or IPv6 address",
    ),
    (
        pod(status={"podIPs": [{"ip": "::ffff:10.1.0.1"}]}),
        "Pod shop/web: status.podIPs[0]: '::ffff:10.1.0.1' has a zone or is an IPv4 address in IPv6 form: "
        "write the plain address",
    ),
    (
        pod(spec={"containers": [{"name": "a", "ports": [{"containerPort": 0}]}]}),
        "Pod shop/web: spec.containers[0].ports[0].containerPort: expected a whole number >= 1, got 0",
    ),
    (
        pod(spec={"containers": [{"name": "a", "livenessProbe": {"httpGet": {"port": "80"}}}]}),
        "Pod shop/web: spec.containers[0].livenessProbe.httpGet.port: expected a port name of lower-case "
        "letters, digits and '-' with at least one letter, got '80'",
    ),
    (
        service({"ports": [{"port": "80"}]}),
        "Service web: spec.ports[0].port: expected a whole number, got text",
    ),
    (
        service({"selector": {"app": 1}}),
        "Service web: spec.selector.app: expected text, got a whole number: put it in quotes",
    ),
    (service({"selector": {"app": None}}), "Service web: spec.selector.app: expected text, got nothing"),
    ({**POLICY, "spec": {"action": "Deny"}}, "expected ALLOW or AUDIT or CUSTOM or DENY, got 'Deny'"),
    (
        {**POLICY, "spec": {"rules": [{"from": None}]}},
        "AuthorizationPolicy p: spec.rules[0].from: expected a list, got nothing",
    ),
    (
        {**POLICY, "spec": {"rules": [{"from": [{"source": {"principals": None}}]}]}},
        "AuthorizationPolicy p: spec.rules[0].from[0].source.principals: expected a list, got nothing",
    ),
    (
        {**POLICY, "spec": {"rules": [{"from": [{"source": {"notPrincipal": ["x"]}}]}]}},
        "AuthorizationPolicy p: spec.rules[0].from[0].source: unknown field notPrincipal",
    ),
    (
        {**POLICY, "spec": {"rules": [{"to": [{"operation": {"ports": [80]}}]}]}},
        "AuthorizationPolicy p: spec.rules[0].to[0].operation.ports[0]: expected text, got a whole number: "
        "put it in quotes",
    ),
    (
        {**POLICY, "spec": {"selector": {"matchExpressions": []}}},
        "AuthorizationPolicy p: spec.selector: unknown field matchExpressions",
    ),
    (
        {**POLICY, "spec": {"selector": {"matchLabels": {"app": "a*"}}}},
        "AuthorizationPolicy p: spec.selector: matchLabels has app=a*, which no label can be: "
        "wildcards do not work here",
    ),
]


@pytest.mark.parametrize(("raw", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_a_bad_object_is_refused_with_the_path_of_the_field(raw: object, message: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(raw)
    assert message in str(caught.value)


def test_recursive_and_exploding_aliases_are_refused() -> None:
    loop: dict[str, Any] = {}
    loop["spec"] = loop
    with pytest.raises(DecodeError, match="nested too deep"):
        decode(pod(spec=loop))
    bomb: Any = "x"
    for _ in range(30):
        bomb = [bomb, bomb]
    with pytest.raises(DecodeError, match="nested too deep or too large"):
        decode(pod(spec={"containers": bomb}))


@pytest.mark.parametrize(
    ("raw", "kinds"),
    [
        ({"kind": "List", "items": [pod(), service({})]}, ["Pod", "Service"]),
        ({"kind": "List", "items": None}, []),
        ({"kind": "PodList", "apiVersion": "v1", "items": [{"metadata": {"name": "a", "uid": "u"}}]}, ["Pod"]),
        (pod(), ["Pod"]),
    ],
    ids=["List", "empty", "PodList", "none"],
)
def test_lists_are_unpacked(raw: object, kinds: list[str]) -> None:
    assert [type(decode(item)).__name__ for _, item in unwrap(raw)] == kinds


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
METADATA_WORDS = ["metadata", "name", "namespace", "uid", "labels"]
POD_WORDS = ["spec", "status", "containers", "ports", "podIPs", "ip", "httpGet", "livenessProbe", "port"]
SERVICE_WORDS = ["selector", "clusterIPs", "targetPort", "matchLabels"]
POLICY_WORDS = ["rules", "from", "to", "when", "source", "operation", "principals", "action", "key", "values"]
WORDS = st.sampled_from([*METADATA_WORDS, *POD_WORDS, *SERVICE_WORDS, *POLICY_WORDS])
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | SCALARS, inner, max_size=5),
    max_leaves=20,
)


@given(st.sampled_from(sorted(KINDS)), st.dictionaries(WORDS, TREES, max_size=4))
@settings(max_examples=300)
def test_an_arbitrary_mapping_gives_an_object_or_the_documented_error(kind: str, body: dict[str, Any]) -> None:
    raw = {"kind": kind, "apiVersion": KINDS[kind].api_versions[0], **body}
    raw.setdefault("metadata", {"name": "x", "uid": "u"})
    try:
        decoded = decode(raw)
    except DecodeError as error:
        assert str(error)
    else:
        assert type(decoded).__name__ == kind


@given(TREES)
def test_an_arbitrary_value_never_raises_anything_else(raw: object) -> None:
    try:
        for _, item in unwrap(raw):
            decode(item)
    except DecodeError:
        pass


YAMLISH = st.text(alphabet="abk:-{}[]&*!|>%@?#'\"\n ,019.~<=_x\t", max_size=60)


@given(YAMLISH.map(str.encode) | st.binary(max_size=60))
@settings(max_examples=500)
def test_arbitrary_bytes_as_a_file_give_objects_or_problems(data: bytes) -> None:
    objects, problems = parse("f.yaml", data)
    assert objects or problems
    assert all("\n" not in str(problem) and str(problem).startswith("f.yaml: ") for problem in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "f.yaml: document 1: no valid YAML at line 2 column 1: did not find expected node content"),
        ("kind: Pod\nkind: Service", "f.yaml: document 1: no valid YAML at line 2 column 1: key 'kind' twice"),
        ("? [a]\n: b", "f.yaml: document 1: no valid YAML at line 1 column 3: a key that is no text"),
        ("--- {}\n--- !!python/object:os.system {}", "f.yaml: document 2: no valid YAML at line 2"),
        ("a: !!bool maybe", "f.yaml: document 1: no valid YAML"),
        ("a: !!int ''", "f.yaml: document 1: no valid YAML"),
        ("[" * 5000, "f.yaml: document 1: no valid YAML"),
        ("", "f.yaml: holds no object: add one, or delete the file"),
        ("# nothing\n---\n---\n", "f.yaml: holds no object: add one, or delete the file"),
        ("kind: List\nitems: 3", "f.yaml: document 1: List: items: expected a list"),
        ("kind: List\nitems: [{}, {kind: Pod}]", "f.yaml: document 1 item 2: Pod: apiVersion: expected v1"),
    ],
    ids=lambda v: v[:30],
)
def test_a_bad_file_is_one_line_with_file_and_document(text: str, message: str) -> None:
    _, problems = parse("f.yaml", text.encode())
    assert any(str(problem).startswith(message) for problem in problems), problems


def test_every_bad_object_of_a_file_is_named_at_once() -> None:
    _, problems = parse("f.yaml", b"kind: A\n---\nkind: B\n---\nkind: Pod\napiVersion: v1\n")
    assert [(problem.document, problem.field) for problem in problems] == [(1, "kind"), (2, "kind"), (3, "")]


def test_a_date_without_quotes_stays_text() -> None:
    data = b"kind: Pod\napiVersion: v1\nmetadata: {name: a, uid: u, deletionTimestamp: 2026-01-02T03:04:05Z}"
    objects, problems = parse("f.yaml", data)
    assert not problems
    assert objects[0].object.metadata.deletion_timestamp == "2026-01-02T03:04:05Z"
