import itertools

import pytest

from undermesh.api.documents import parse
from undermesh.api.merge import Content, merge


def pod(name: str, uid: str = "", ip: str = "", extra: str = "") -> str:
    ips = f"podIPs: [{{ip: '{ip}'}}]" if ip else ""
    return (
        f"{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: n, uid: '{uid or name}'}},"
        f" spec: {{{'hostNetwork: true' if extra == 'host' else ''}}},"
        f" status: {{{', '.join(x for x in (ips, 'phase: Failed' if extra == 'failed' else '') if x)}}}}}"
    )


def content(file: str, *documents: str) -> Content:
    objects, problems = parse(file, "\n---\n".join(documents).encode())
    assert not (documents and problems), problems
    return objects


def files(**documents: tuple[str, ...]) -> dict[str, Content]:
    return {f"{name}.yaml": content(f"{name}.yaml", *texts) for name, texts in documents.items()}


def names(contents: dict[str, Content]) -> dict[str, list[str]]:
    return {name: [c.object.metadata.name for c in content] for name, content in contents.items()}


CONFLICTS = [
    ("same name", pod("a", "u1"), pod("a", "u2"), "b.yaml: document 1: Pod n/a: stands in a.yaml document 1 too"),
    ("same uid", pod("a", "u"), pod("b", "u"), "metadata.uid: u belongs to Pod n/a in a.yaml document 1 too"),
    (
        "same address",
        pod("a", ip="10.1.0.1"),
        pod("b", ip="10.1.0.1"),
        "status.podIPs: 10.1.0.1 belongs to Pod n/a in a.yaml document 1 too: give each pod its own address",
    ),
    ("one address, two spellings", pod("a", ip="fd00::1"), pod("b", ip="fd00:0::1"), "fd00::1 belongs to"),
]


@pytest.mark.parametrize(("first", "second", "message"), [pytest.param(*r[1:], id=r[0]) for r in CONFLICTS])
def test_of_two_new_files_that_contradict_each_other_the_later_name_loses(
    first: str, second: str, message: str
) -> None:
    merged = merge({}, files(a=(first,), b=(second, pod("z"))))
    assert [len(merged.contents[name]) for name in ("a.yaml", "b.yaml")] == [1, 0]
    assert [problem.file for problem in merged.problems] == ["b.yaml"]
    assert message in str(merged.problems[0])


@pytest.mark.parametrize(("first", "second", "message"), [pytest.param(*r[1:], id=r[0]) for r in CONFLICTS])
def test_a_contradiction_inside_one_file_is_found_too(first: str, second: str, message: str) -> None:
    merged = merge({}, files(a=(first, second)))
    assert merged.contents["a.yaml"] == ()
    assert "in a.yaml document 1 too" in str(merged.problems[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pod("a", ip="10.0.0.1", extra="host"), pod("b", ip="10.0.0.1", extra="host")),
        (pod("a", ip="10.0.0.1", extra="host"), pod("b", ip="10.0.0.1")),
        (pod("a", ip="10.0.0.1", extra="failed"), pod("b", ip="10.0.0.1")),
    ],
    ids=["two on the node's network", "one on the node's network", "one has finished"],
)
def test_an_address_that_only_one_pod_holds_for_itself_is_no_contradiction(first: str, second: str) -> None:
    assert merge({}, files(a=(first,), b=(second,))).problems == ()


def test_a_file_in_force_wins_over_a_new_one_with_an_earlier_name() -> None:
    accepted = files(b=(pod("x", "u1"),))
    merged = merge(accepted, {**accepted, **files(a=(pod("x", "u2"),))})
    assert names(dict(merged.contents)) == {"a.yaml": [], "b.yaml": ["x"]}
    assert merged.problems[0].file == "a.yaml"


def test_a_loser_keeps_what_it_had_and_is_taken_once_the_way_is_free() -> None:
    accepted = files(a=(pod("x"),), b=(pod("y"),))
    offered = {**accepted, **files(b=(pod("x", "other"),))}
    merged = merge(accepted, offered)
    assert names(dict(merged.contents)) == {"a.yaml": ["x"], "b.yaml": ["y"]}
    del offered["a.yaml"]
    freed = merge({"b.yaml": merged.contents["b.yaml"]}, offered)
    assert names(dict(freed.contents)) == {"b.yaml": ["x"]}
    assert freed.problems == ()


def test_an_object_may_move_between_two_files_that_change_together() -> None:
    accepted = files(a=(pod("x"), pod("k")), b=(pod("y"),))
    merged = merge(accepted, files(a=(pod("k"),), b=(pod("y"), pod("x"))))
    assert names(dict(merged.contents)) == {"a.yaml": ["k"], "b.yaml": ["y", "x"]}


def test_a_file_that_must_fall_back_pushes_out_one_that_took_its_object() -> None:
    accepted = files(a=(pod("x"),), b=(pod("y"),), c=(pod("z"),))
    offered = files(a=(pod("w", "z"),), b=(pod("y"), pod("x")), c=(pod("z"),))
    merged = merge(accepted, offered)
    assert names(dict(merged.contents)) == {"a.yaml": ["x"], "b.yaml": ["y"], "c.yaml": ["z"]}
    assert {problem.file for problem in merged.problems} == {"a.yaml", "b.yaml"}


def test_any_sequence_of_contents_ends_without_a_contradiction_in_force() -> None:
    options = [(), (pod("x", "1"),), (pod("x", "2"),), (pod("y", "1"),)]
    accepted: dict[str, Content] = {}
    for choice in itertools.product(options, repeat=3):
        offered = files(**dict(zip("abc", choice, strict=True)))
        merged = merge(accepted, offered)
        accepted = dict(merged.contents)
        everything = [located.object for content in accepted.values() for located in content]
        assert len({o.metadata.name for o in everything}) == len(everything)
        assert len({o.metadata.uid for o in everything}) == len(everything)
        changed = [n for n in offered if accepted[n] != offered[n]]
        assert sorted(changed) == sorted(problem.file for problem in merged.problems)
