"""States of a table that follow each other, against plain dictionaries."""

import gc
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from undermesh.api.changes import Snapshot, changes

steps = st.lists(st.dictionaries(st.integers(0, 9), st.none() | st.integers(1, 3), max_size=4), max_size=20)


@given(steps=steps, most=st.integers(0, 6))
def test_every_state_is_what_its_changes_made_of_the_one_before(steps: list[dict[int, int | None]], most: int) -> None:
    state: Snapshot[int, int] = Snapshot({})
    model: dict[int, int] = {}
    with mock.patch("undermesh.api.changes._MOST_CHANGES", most):
        for touched in steps:
            before, was = state, dict(model)
            state = state.after(touched)
            for key, value in touched.items():
                model.pop(key, None)
                if value is not None:
                    model[key] = value
            assert state == model and dict(state) == model and len(state) == len(model)
            assert {key: state.get(key) for key in range(10)} == {key: model.get(key) for key in range(10)}
            assert before == was, "a state never changes"
            expected = {(key, was.get(key), model.get(key)) for key in range(10) if was.get(key) != model.get(key)}
            for known in (before, was):
                assert set(changes(known, state)) == expected
            assert state.touched_since(before) == frozenset(touched) and state.touched_since(was) is None


def test_what_differs_is_known_to_a_consumer_that_keeps_up_and_found_by_one_that_does_not() -> None:
    first = Snapshot({number: str(number) for number in range(3)})
    second = first.after({1: "x"})
    third = second.after({2: None})
    assert third.touched_since(first) is None
    assert sorted(changes(first, third), key=str) == [(1, "1", "x"), (2, "2", None)]
    del second
    gc.collect()
    assert third.touched_since(None) is None, "a state that is gone is not taken for any other"
