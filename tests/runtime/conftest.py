"""A node for the tests of its runtime."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from onnode import OnNode, remove_all

from undermesh.lab.kube.ground import Ground


@pytest.fixture(scope="module")
def ground() -> Iterator[OnNode]:
    """One node for a module's tests."""
    with Ground("runtime-tests", nodes=1) as made:
        yield OnNode(made)


@pytest.fixture
def node(ground: OnNode) -> Iterator[OnNode]:
    """The module's node; the test's pods are removed."""
    yield ground
    ground.run(remove_all)
