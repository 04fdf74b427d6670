from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from undermesh.lab import apps, netns
from undermesh.lab.cluster import Cluster
from undermesh.lab.commands import ip_batch

DEMO = Path(__file__).parent / "cluster"
APPS = Path(apps.__file__).parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The demo's cluster without a mesh, one for a module."""
    with Cluster(DEMO) as built:
        yield built


@pytest.fixture
def wire() -> Iterator[tuple[str, str]]:
    """Two netns of a test's own, joined by a veth: 10.0.0.1 and fd00::1 on `u0` of the first, .2 and ::2 behind."""
    names = tuple(f"um-t{secrets.token_hex(2)}-{side}" for side in "ab")
    made_mount = netns.prepare_directory()
    try:
        for name in names:
            netns.create(name)
            netns.set_sysctls(name, {f"net/ipv6/conf/{each}/accept_dad": "0" for each in ("all", "default")})
        ip_batch(names[0], [f"link add u0 type veth peer name u0 netns {names[1]}"])
        for number, name in enumerate(names, 1):
            addresses = [f"addr add 10.0.0.{number}/24 dev u0", f"addr add fd00::{number}/64 dev u0 nodad"]
            ip_batch(name, ["link set lo up", *addresses, "link set u0 up"])
        yield names[0], names[1]
    finally:
        for name in names:
            netns.delete(name)
        if made_mount:
            netns.restore_directory()
