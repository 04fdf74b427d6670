"""How the outcomes of many callers become rows."""

import msgspec

from undermesh.cli import callers
from undermesh.cli.answers import Explanation


def explanation(source: str, identity: str, **way: object) -> Explanation:
    """One caller's, with one way."""
    capture = "BY_THIS_ZTUNNEL" if identity else "NOT_IN_MESH"
    plain = {
        "node": "node1",
        "source_workload": source,
        "source_address": "10.1.1.2",
        "source_identity": identity,
        "capture": capture,
        "ways": [{"allowed": True, "judged": True, "lane": "hbone", **way}],
    }
    return msgspec.convert(plain, Explanation)


def test_workloads_of_one_identity_and_outcome_share_a_row() -> None:
    found = callers.gather([explanation("a/2", "id"), explanation("a/1", "id"), explanation("a/3", "other")])
    assert [(row.identity, row.sources) for row in found] == [("id", ("a/1", "a/2")), ("other", ("a/3",))]


def test_the_refused_come_first_and_name_what_refuses_them() -> None:
    refused = explanation("a/2", "z", allowed=False, policy="ns/deny", reason="explicitly denied")
    unmatched = explanation("", "", allowed=False, policy="", reason="none allowed")
    found = callers.gather([explanation("a/1", "a"), refused, unmatched])
    assert [(row.result, row.by) for row in found] == [
        ("REFUSED", "none allowed"),
        ("REFUSED", "ns/deny"),
        ("allowed", ""),
    ]
    assert found[0].sources == ("anyone (10.1.1.2)",)


def test_where_nobody_asks_policy_that_is_said() -> None:
    (row,) = callers.gather([explanation("a/1", "a", judged=False)])
    assert row.by == "nobody asks policy"
