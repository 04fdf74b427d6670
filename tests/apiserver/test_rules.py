"""Selectors, RBAC, schemas, ages and other pure parts, as tables."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undermesh.lab.apiserver import structural
from undermesh.lab.apiserver.addresses import Addresses, AllocationError
from undermesh.lab.apiserver.ages import duration
from undermesh.lab.apiserver.errors import ApiError
from undermesh.lab.apiserver.jsonpath import find
from undermesh.lab.apiserver.paths import Target, parse
from undermesh.lab.apiserver.podrow import pod_row
from undermesh.lab.apiserver.rbac import Attributes, rule_allows, subject_is
from undermesh.lab.apiserver.selectors import parse_fields, parse_labels, selection
from undermesh.lab.apiserver.user import User

LABELS = {"app": "web", "tier": "front", "n": "5", "empty": ""}
SELECTORS = [
    ("", True),
    ("app", True),
    ("!app", False),
    ("!db", True),
    ("app=web", True),
    ("app==web", True),
    ("app!=web", False),
    ("db!=x", True),
    ("app in (web, api)", True),
    ("app in (api)", False),
    ("app notin (api)", True),
    ("db notin (api)", True),
    ("n>4", True),
    ("n<5", False),
    ("app>4", False),
    ("app=web,tier=front", True),
    ("app=web,tier=back", False),
    ("empty=", True),
    ("app=", False),
    ("empty in (,x)", True),
    (" app = web , tier in ( front ) ", True),
]


@pytest.mark.parametrize(("text", "chosen"), SELECTORS)
def test_label_selectors_choose_as_documented(text: str, chosen: bool) -> None:
    assert all(requirement.matches(LABELS) for requirement in parse_labels(text)) is chosen


@pytest.mark.parametrize("text", ["app in", "app in (a", "=x", "a b", "app=,=", "a,,b", "a,", "in (a)", "!"])
def test_selectors_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_labels(text)
    assert refused.value.code == 400


@given(st.text("ab=!,() in<>", max_size=12))
def test_any_selector_is_parsed_or_refused(text: str) -> None:
    try:
        parse_labels(text)
    except ApiError as refused:
        assert refused.code == 400


PODS = {"metadata": {"name": "p", "namespace": "n"}, "spec": {"nodeName": "a"}, "status": {"phase": "Running"}}


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("spec.nodeName=a", True),
        ("spec.nodeName!=a", False),
        ("status.phase=Running,metadata.name=p", True),
        ("status.phase==Failed", False),
        ("spec.hostNetwork=false", True),
        ("status.nominatedNodeName=", True),
    ],
)
def test_field_selectors_read_the_fields_of_pods(text: str, chosen: bool) -> None:
    predicate = selection((), parse_fields(text, "pods"))
    assert predicate is not None and predicate(PODS) is chosen


RULE = {"apiGroups": ["", "apps"], "resources": ["pods", "*/scale", "deployments"], "verbs": ["get", "list"]}
ACCESS = [
    (RULE, Attributes("get", "", "pods"), True),
    (RULE, Attributes("delete", "", "pods"), False),
    (RULE, Attributes("get", "batch", "jobs"), False),
    (RULE, Attributes("get", "", "pods", "log"), False),
    (RULE, Attributes("get", "apps", "statefulsets", "scale"), True),
    ({**RULE, "resourceNames": ["a"]}, Attributes("get", "", "pods", name="a"), True),
    ({**RULE, "resourceNames": ["a"]}, Attributes("list", "", "pods"), False),
    ({"nonResourceURLs": ["/healthz", "/api/*"], "verbs": ["get"]}, Attributes("get", path="/api/v1"), True),
    ({"nonResourceURLs": ["/healthz"], "verbs": ["*"]}, Attributes("get", path="/metrics"), False),
    ({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}, Attributes("get", path="/metrics"), False),
]


@pytest.mark.parametrize(("rule", "wanted", "allowed"), ACCESS)
def test_rules_allow_just_what_they_say(rule: Any, wanted: Attributes, allowed: bool) -> None:
    assert rule_allows(rule, wanted) is allowed


@pytest.mark.parametrize(
    ("subject", "fits"),
    [
        ({"kind": "User", "name": "system:serviceaccount:a:b"}, True),
        ({"kind": "ServiceAccount", "name": "b", "namespace": "a"}, True),
        ({"kind": "ServiceAccount", "name": "b"}, False),
        ({"kind": "Group", "name": "g"}, True),
        ({"kind": "Group", "name": "system:serviceaccount:a:b"}, False),
    ],
)
def test_subjects_mean_users_groups_and_accounts(subject: Any, fits: bool) -> None:
    assert subject_is(subject, User("system:serviceaccount:a:b", ("g",)), "other") is fits


SCHEMA: Any = {
    "type": "object",
    "required": ["size"],
    "properties": {
        "size": {"type": "integer", "minimum": 1, "maximum": 9},
        "color": {"type": "string", "enum": ["red"], "default": "red"},
        "name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3, "nullable": True},
        "port": {"x-kubernetes-int-or-string": True},
        "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}, "maxItems": 2},
        "more": {"type": "object", "additionalProperties": {"type": "object", "properties": {"a": {"type": "number"}}}},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
    },
}
VALUES = [
    ({"size": 1}, ""),
    ({}, "Required value"),
    ({"size": "1"}, "must be of type integer"),
    ({"size": True}, "must be of type integer"),
    ({"size": 0}, "greater than or equal to 1"),
    ({"size": 10}, "less than or equal to 9"),
    ({"size": 1, "color": "blue"}, "supported values"),
    ({"size": 1, "name": "A"}, "should match"),
    ({"size": 1, "name": "abcd"}, "Too long"),
    ({"size": 1, "name": None}, ""),
    ({"size": 1, "port": "http"}, ""),
    ({"size": 1, "port": 1.5}, "integer,string"),
    ({"size": 1, "tags": ["a", "a"]}, "Duplicate value"),
    ({"size": 1, "tags": ["a", "b", "c"]}, "Too many"),
    ({"size": 1, "more": {"x": {"a": "y"}}}, "must be of type number"),
]


@pytest.mark.parametrize(("value", "problem"), VALUES)
def test_custom_resources_are_held_to_their_schema(value: Any, problem: str) -> None:
    causes = structural.validate(value, SCHEMA)
    assert problem in causes[0].message if problem else causes == []


def test_pruning_and_defaulting_follow_the_schema() -> None:
    dropped: list[str] = []
    value = {"size": 1, "x": 1, "more": {"k": {"a": 1, "b": 2}}, "free": {"z": {"y": 1}}}
    pruned = structural.prune(value, SCHEMA, "", dropped)
    assert pruned == {"size": 1, "more": {"k": {"a": 1}}, "free": {"z": {"y": 1}}}
    assert sorted(dropped) == ["more.k.b", "x"]
    assert structural.default(pruned, SCHEMA)["color"] == "red"
    assert structural.prune(pruned, SCHEMA) == pruned


DURATIONS = [
    (0, "0s"),
    (119, "119s"),
    (120, "2m"),
    (125, "2m5s"),
    (601, "10m"),
    (10799, "179m"),
    (10800, "3h"),
    (12000, "3h20m"),
    (86400, "24h"),
    (172800, "2d"),
    (180000, "2d2h"),
    (864000, "10d"),
    (-5, "<invalid>"),
]


@pytest.mark.parametrize(("seconds", "text"), DURATIONS)
def test_ages_are_written_as_kubectl_does(seconds: int, text: str) -> None:
    assert duration(seconds) == text


PATHS = [
    ("/api/v1/pods", Target("", "v1", "pods")),
    ("/api/v1/namespaces", Target("", "v1", "namespaces")),
    ("/api/v1/namespaces/a", Target("", "v1", "namespaces", "", "a")),
    ("/api/v1/namespaces/a/finalize", Target("", "v1", "namespaces", "", "a", "finalize")),
    ("/api/v1/namespaces/a/pods/p/log", Target("", "v1", "pods", "a", "p", "log")),
    ("/apis/apps/v1/namespaces/a/deployments", Target("apps", "v1", "deployments", "a")),
    (
        "/apis/rbac.authorization.k8s.io/v1/clusterroles/system%3Anode",
        Target("rbac.authorization.k8s.io", "v1", "clusterroles", "", "system:node"),
    ),
    ("/api/v1", None),
    ("/apis/apps/v1", None),
    ("/version", None),
]


@pytest.mark.parametrize(("path", "target"), PATHS)
def test_paths_name_their_targets(path: str, target: Target | None) -> None:
    assert parse(path) == target


def test_jsonpath_reaches_fields_indexes_and_filters() -> None:
    obj = {"a": [{"t": "x", "v": 1}, {"t": "y", "v": 2}], "m": {"k.io/n": "s"}}
    assert find(obj, ".a[0].v") == [1]
    assert find(obj, '.a[?(@.t=="y")].v') == [2]
    assert find(obj, ".a[*].v") == [1, 2]
    assert find(obj, r".m.k\.io/n") == ["s"]
    assert find(obj, ".a[9].v") == find(obj, ".x.y") == []


def _state(**state: Any) -> Any:
    return {"name": "c", "ready": "running" in state, "restartCount": 0, "state": state}


ROWS = [
    ({"phase": "Pending"}, None, "Pending", "0/1"),
    ({"phase": "Running", "containerStatuses": [_state(running={})]}, None, "Running", "1/1"),
    ({"phase": "Running", "containerStatuses": [_state(running={})]}, "now", "Terminating", "1/1"),
    (
        {"phase": "Pending", "containerStatuses": [_state(waiting={"reason": "ErrImagePull"})]},
        None,
        "ErrImagePull",
        "0/1",
    ),
    ({"phase": "Running", "containerStatuses": [_state(terminated={"exitCode": 3})]}, None, "ExitCode:3", "0/1"),
    (
        {"phase": "Succeeded", "containerStatuses": [_state(terminated={"exitCode": 0, "reason": "Completed"})]},
        "now",
        "Completed",
        "0/1",
    ),
    ({"phase": "Pending", "initContainerStatuses": [{**_state(running={}), "name": "i"}]}, None, "Init:0/1", "0/1"),
    ({"phase": "Failed", "reason": "Evicted"}, None, "Evicted", "0/1"),
]


@pytest.mark.parametrize(("status", "deleted", "word", "ready"), ROWS)
def test_a_pod_has_one_word_for_its_state(status: Any, deleted: str | None, word: str, ready: str) -> None:
    metadata: Any = {"name": "p", **({"deletionTimestamp": deleted} if deleted else {})}
    spec: Any = {"containers": [{"name": "c"}]}
    if "initContainerStatuses" in status:
        spec["initContainers"] = [{"name": "i"}]
    row = pod_row({"metadata": metadata, "spec": spec, "status": status})
    assert (row[2], row[1]) == (word, ready)


def service(uid: str, **spec: Any) -> Any:
    return {"metadata": {"uid": uid}, "spec": {"type": "ClusterIP", "ports": [{"port": 80, "protocol": "TCP"}], **spec}}


def test_services_get_addresses_of_the_families_they_ask_for() -> None:
    addresses = Addresses(["10.0.0.0/28", "fd00::/112"])
    single, dual, headless = (
        service("1"),
        service("2", ipFamilyPolicy="RequireDualStack", ipFamilies=["IPv6"]),
        service("3", clusterIP="None"),
    )
    for made in (single, dual, headless):
        addresses.complete(made, None)
        addresses.claim(made)
    assert single["spec"]["clusterIPs"] == ["10.0.0.10"] and single["spec"]["ipFamilyPolicy"] == "SingleStack"
    assert dual["spec"]["ipFamilies"] == ["IPv6", "IPv4"] and dual["spec"]["clusterIPs"][0].startswith("fd00::")
    assert headless["spec"]["clusterIP"] == "None" and "nodePort" not in headless["spec"]["ports"][0]


def test_addresses_and_ports_are_given_once() -> None:
    addresses = Addresses(["10.0.0.0/28"])
    first = service("1", type="NodePort")
    addresses.complete(first, None)
    addresses.claim(first)
    port = first["spec"]["ports"][0]["nodePort"]
    for wrong in (
        service("2", clusterIP=first["spec"]["clusterIP"]),
        service("3", type="NodePort", ports=[{"port": 1, "protocol": "TCP", "nodePort": port}]),
        service("4", clusterIP="192.168.0.1"),
        service("5", ipFamilyPolicy="RequireDualStack"),
        service("6", type="NodePort", ports=[{"port": 1, "protocol": "TCP", "nodePort": 80}]),
    ):
        with pytest.raises(AllocationError):
            addresses.complete(wrong, None)
    for number in range(10, 14):
        made = service(str(number))
        addresses.complete(made, None)
        addresses.claim(made)
    for _ in range(20):
        try:
            made = service("20")
            addresses.complete(made, None)
        except AllocationError as full:
            assert "full" in str(full)
            return
        made["metadata"]["uid"] += "x"
        addresses.claim(made)
    pytest.fail("a range of 16 gave more than 20 addresses")
