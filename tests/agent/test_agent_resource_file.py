"""The kept xDS state is what was there last, whatever became of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from undermesh.agent import resource_file
from undermesh.agent.resource_file import ResourceFile
from undermesh.agent.xds_state import ADDRESS, AUTHORIZATION, Batch, Resource, ResourceKey
from undermesh.proto import workload_pb2

State = dict[ResourceKey, Resource]


def address(name: str, version: str = "1") -> Resource:
    value = workload_pb2.Address(workload=workload_pb2.Workload(uid=name, name=version * 50)).SerializeToString()
    return Resource(ADDRESS, name, version, value)


def keep(file: ResourceFile, state: State, batch: Batch) -> None:
    """As the xDS client does."""
    state |= {(item.type_url, item.name): item for item in batch.upserts}
    for key in batch.removals:
        state.pop(key, None)
    if not file.append(batch):
        file.replace(state.values())


def batches(count: int) -> list[Batch]:
    """Additions, replacements and removals."""
    return [
        Batch((address(f"pod-{i % 7}", str(i)),), ((ADDRESS, f"pod-{(i + 3) % 7}"),) if i % 3 == 0 else ())
        for i in range(count)
    ]


@pytest.mark.parametrize("smallest", [0, 1 << 16])
def test_what_is_loaded_is_what_was_kept_and_the_file_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallest: int
) -> None:
    monkeypatch.setattr(resource_file, "_SMALLEST", smallest)
    path, state = tmp_path / "xds.bin", State()
    file = ResourceFile(path)
    for batch in batches(200):
        keep(file, state, batch)
        assert ResourceFile(path).load() == state
    whole = sum(len(item.value) + 200 for item in state.values())
    assert path.stat().st_size < 3 * whole + 2 * smallest


@pytest.mark.parametrize("cut", [1, 3, 20])
def test_a_batch_that_a_crash_cut_off_is_as_if_it_never_came(tmp_path: Path, cut: int) -> None:
    path, state = tmp_path / "xds.bin", State()
    file = ResourceFile(path)
    for batch in batches(4):
        keep(file, state, batch)
    keep(file, dict(state), Batch((address("late"),)))
    path.write_bytes(path.read_bytes()[:-cut])
    successor = ResourceFile(path)
    assert successor.load() == state
    keep(successor, state, Batch((address("later"),)))
    assert ResourceFile(path).load() == state, "nothing is written behind half a record"


@pytest.mark.parametrize("content", [None, b"", b"\xff\xff\xff", b"hello", b"\0\0\0\3\xff\xff\xff"])
def test_a_missing_or_damaged_file_counts_as_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "xds.bin"
    if content is not None:
        path.write_bytes(content)
    assert ResourceFile(path).load() == {}


def test_what_this_agent_cannot_read_is_left_out_alone(tmp_path: Path) -> None:
    path, good = tmp_path / "xds.bin", address("good")
    strange = Resource("type.googleapis.com/of.a.newer.Agent", "a", "1", b"")
    ResourceFile(path).replace([strange, good, Resource(AUTHORIZATION, "b", "1", b"\xff")])
    assert ResourceFile(path).load() == {(ADDRESS, "good"): good}


def test_a_file_that_cannot_be_written_is_said_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "xds.bin"
    file = ResourceFile(path)
    (tmp_path / "run").write_text("in the way")
    file.replace([address("a")])
    assert f"xDS state cannot be kept in {path}" in caplog.text
    (tmp_path / "run").unlink()
    assert not file.append(Batch((address("b"),)))
    file.replace([address("a"), address("b")])
    assert {name for _, name in ResourceFile(path).load()} == {"a", "b"}
    path.unlink()
    assert not file.append(Batch((address("c"),))), "a batch without the state before it is no state"
