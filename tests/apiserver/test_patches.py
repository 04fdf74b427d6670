"""Merge, JSON and strategic patches, and server-side apply, without a server."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undermesh.lab.apiserver import models
from undermesh.lab.apiserver.errors import ApiError
from undermesh.lab.apiserver.fieldset import fields_of, from_fields_v1, spelled, to_fields_v1
from undermesh.lab.apiserver.jsonpatch import PatchError, json_patch, merge_patch
from undermesh.lab.apiserver.managed import APPLY, UPDATE, Manager, after_update
from undermesh.lab.apiserver.schema import ANY, Node
from undermesh.lab.apiserver.ssa import apply
from undermesh.lab.apiserver.strategic import strategic_merge

POD = models.model("core_v1.Pod")

# The examples of RFC 7386, appendix A.
MERGES = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "result"), MERGES)
def test_merge_patch_follows_the_rfc(target: Any, patch: Any, result: Any) -> None:
    assert merge_patch(target, patch) == result


OPERATIONS = [
    ({"foo": "bar"}, [{"op": "add", "path": "/baz", "value": 1}], {"foo": "bar", "baz": 1}),
    ({"foo": ["a", "c"]}, [{"op": "add", "path": "/foo/1", "value": "b"}], {"foo": ["a", "b", "c"]}),
    ({"foo": ["a"]}, [{"op": "add", "path": "/foo/-", "value": "b"}], {"foo": ["a", "b"]}),
    ({"foo": ["a", "b"]}, [{"op": "remove", "path": "/foo/0"}], {"foo": ["b"]}),
    ({"a": {"b": 1}}, [{"op": "move", "from": "/a/b", "path": "/c"}], {"a": {}, "c": 1}),
    ({"a": 1}, [{"op": "copy", "from": "/a", "path": "/b"}], {"a": 1, "b": 1}),
    (
        {"a/b": 1, "m~n": 2},
        [{"op": "replace", "path": "/a~1b", "value": 3}, {"op": "remove", "path": "/m~0n"}],
        {"a/b": 3},
    ),
    ({"a": 1}, [{"op": "test", "path": "/a", "value": 1}, {"op": "replace", "path": "", "value": {}}], {}),
]


@pytest.mark.parametrize(("document", "operations", "result"), OPERATIONS)
def test_json_patch_follows_the_rfc(document: Any, operations: Any, result: Any) -> None:
    before = copy.deepcopy(document)
    assert json_patch(document, operations) == result
    assert document == before


BROKEN = [
    [{"op": "remove", "path": "/nope"}],
    [{"op": "replace", "path": "/nope", "value": 1}],
    [{"op": "test", "path": "/a", "value": True}],
    [{"op": "add", "path": "/list/5", "value": 1}],
    [{"op": "add", "path": "/list/01", "value": 1}],
    [{"op": "add", "path": "a", "value": 1}],
    [{"op": "add", "path": "/a"}],
    [{"op": "flip", "path": "/a"}],
    [{"op": "move", "from": "/list", "path": "/list/0"}],
]


@pytest.mark.parametrize("operations", BROKEN)
def test_json_patches_that_do_not_fit_are_refused(operations: Any) -> None:
    with pytest.raises(PatchError):
        json_patch({"a": 1, "list": [1]}, operations)


def pod(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p", "labels": {"a": "1"}}, "spec": spec}


TWO = [{"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}]}, {"name": "b", "image": "1"}]
STRATEGIC = [
    (
        {"containers": [{"name": "a", "image": "2"}]},
        [{"name": "a", "image": "2", "env": [{"name": "X", "value": "1"}]}, TWO[1]],
    ),
    ({"containers": [{"name": "b", "$patch": "delete"}]}, [TWO[0]]),
    ({"containers": [{"name": "c", "image": "3"}]}, [*TWO, {"name": "c", "image": "3"}]),
    ({"containers": [{"$patch": "replace"}, {"name": "z", "image": "9"}]}, [{"name": "z", "image": "9"}]),
    ({"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}, [TWO[1], TWO[0]]),
    (
        {"containers": [{"name": "a", "env": [{"name": "X", "$patch": "delete"}, {"name": "Y", "value": "2"}]}]},
        [{"name": "a", "image": "1", "env": [{"name": "Y", "value": "2"}]}, TWO[1]],
    ),
]


@pytest.mark.parametrize(("patch", "containers"), STRATEGIC)
def test_strategic_merge_matches_containers_by_name(patch: Any, containers: Any) -> None:
    assert strategic_merge(pod(containers=TWO), {"spec": patch}, POD)["spec"]["containers"] == containers


def test_strategic_merge_replaces_lists_without_a_key() -> None:
    live = pod(containers=[{"name": "a", "command": ["x", "y"]}], tolerations=[{"key": "a"}, {"key": "b"}])
    patch = {"spec": {"tolerations": [{"key": "c"}], "containers": [{"name": "a", "command": ["z"]}]}}
    found = strategic_merge(live, patch, POD)["spec"]
    assert found == {"containers": [{"name": "a", "command": ["z"]}], "tolerations": [{"key": "c"}]}


def test_strategic_merge_knows_its_other_directives() -> None:
    live = {
        "metadata": {"finalizers": ["a", "b"], "labels": {"x": "1"}},
        "spec": {"volumes": [{"name": "v", "emptyDir": {}}]},
    }
    patch = {
        "metadata": {
            "$deleteFromPrimitiveList/finalizers": ["a"],
            "finalizers": ["c"],
            "labels": {"$patch": "replace", "y": "2"},
        },
        "spec": {"volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/x"}}]},
    }
    found = strategic_merge(live, patch, POD)
    assert found["metadata"] == {"finalizers": ["b", "c"], "labels": {"y": "2"}}
    assert found["spec"]["volumes"] == [{"name": "v", "hostPath": {"path": "/x"}}]
    with pytest.raises(PatchError, match="merge key: name"):
        strategic_merge(live, {"spec": {"containers": [{"image": "x"}]}}, POD)


def manager(name: str, operation: str = APPLY, time: str = "t") -> Manager:
    return Manager(name, operation, "v1", "", frozenset(), time)


def applied(live: Any, managers: list[Manager], who: str, config: Any, *, force: bool = False) -> Any:
    return apply(live, config, POD, managers, manager(who), force=force)


def test_apply_removes_what_its_manager_no_longer_names() -> None:
    live, managers = applied({}, [], "me", pod(containers=TWO, nodeName="n"))
    live, managers = applied(live, managers, "me", {"spec": {"containers": [{"name": "a", "image": "1"}]}})
    assert live == {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a", "image": "1"}]}}


def test_apply_leaves_what_others_hold() -> None:
    live, managers = applied({}, [], "me", pod(containers=TWO))
    live, managers = applied(live, managers, "you", {"spec": {"containers": [{"name": "b", "image": "1"}]}})
    live, managers = applied(live, managers, "me", {"spec": {"containers": [TWO[0]]}})
    assert [container["name"] for container in live["spec"]["containers"]] == ["a", "b"]


def test_apply_meets_conflicts_and_takes_by_force() -> None:
    live, managers = applied({}, [], "me", pod(containers=TWO))
    other = {"spec": {"containers": [{"name": "a", "image": "2"}]}}
    with pytest.raises(ApiError) as refused:
        applied(live, managers, "you", other)
    assert str(refused.value) == (
        'Apply failed with 1 conflict: conflict with "me" using v1: .spec.containers[name="a"].image'
    )
    live, managers = applied(live, managers, "you", other, force=True)
    mine = next(found for found in managers if found.name == "me")
    assert live["spec"]["containers"][0]["image"] == "2"
    assert ("f:spec", "f:containers", 'k:{"name":"a"}', "f:image") not in mine.fields


def test_an_update_takes_over_what_it_changes() -> None:
    live, managers = applied({}, [], "me", pod(nodeName="n", hostname="h"))
    changed = {**live, "spec": {"nodeName": "other", "hostname": "h"}}
    managers = after_update(managers, live, changed, POD, manager("you", UPDATE))
    by_name = {found.name: {spelled(path) for path in found.fields} for found in managers}
    assert by_name == {"me": {".metadata.labels.a", ".spec.hostname"}, "you": {".spec.nodeName"}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("abc", max_size=3),
    lambda inner: (
        st.dictionaries(st.text("abxy", min_size=1, max_size=2), inner, max_size=3) | st.lists(inner, max_size=3)
    ),
    max_leaves=12,
)
OBJECT = st.dictionaries(st.text("abxy", min_size=1, max_size=2), JSON, max_size=4)


@given(OBJECT)
def test_field_sets_survive_their_written_form(value: Any) -> None:
    found = fields_of(value, ANY)
    assert from_fields_v1(to_fields_v1(found)) == found


@given(JSON, JSON)
def test_a_merge_patch_applied_twice_changes_nothing_more(target: Any, patch: Any) -> None:
    once = merge_patch(target, patch)
    assert merge_patch(once, patch) == once


@given(OBJECT, OBJECT)
def test_what_was_applied_stands_and_applying_again_changes_nothing(first: Any, second: Any) -> None:
    node: Node = ANY
    live, managers = apply({}, first, node, [], manager("a"), force=True)
    live, managers = apply(live, second, node, managers, manager("b"), force=True)
    assert _within(second, live)
    again, later = apply(live, second, node, managers, manager("b"), force=False)
    assert again == live and {m.identity: m.fields for m in later} == {m.identity: m.fields for m in managers}


def _within(part: Any, whole: Any) -> bool:
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and _within(item, whole[key]) for key, item in part.items())
    return bool(part == whole)
