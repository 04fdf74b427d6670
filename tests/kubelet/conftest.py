"""One small cluster for all tests of a module that need nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from features import needs_root
from kubeletlab import KubeletLab


@pytest.fixture(scope="module")
def lab() -> Iterator[KubeletLab]:
    needs_root()
    with KubeletLab("kubelet") as lab:
        yield lab
