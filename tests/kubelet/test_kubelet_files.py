"""Files that the kubelet writes and reads: volumes that change at once, host paths, logs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from undermesh.lab.apiserver.kubelets import LogOptions
from undermesh.lab.kubelet import atomic, logs, volumes
from undermesh.lab.kubelet.errors import VolumeError
from undermesh.lab.kubelet.payload import File


def files(**contents: str) -> dict[str, File]:
    return {name: File(text.encode(), 0o640) for name, text in contents.items()}


def test_a_volumes_files_are_links_to_the_present_version(tmp_path: Path) -> None:
    assert atomic.write(tmp_path, {"a": File(b"1", 0o400), "d/b": File(b"2", 0o644)})
    assert os.readlink(tmp_path / "a") == "..data/a"
    assert (tmp_path / "d/b").read_text() == "2"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o400


def test_an_update_replaces_all_files_and_forgets_old_ones(tmp_path: Path) -> None:
    atomic.write(tmp_path, files(a="1", gone="x"))
    before = os.readlink(tmp_path / "..data")
    assert atomic.write(tmp_path, files(a="2", new="y"))
    assert os.readlink(tmp_path / "..data") != before
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("..")) == ["a", "new"]
    assert (tmp_path / "a").read_text() == "2"
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("..2")]) == 1


def test_nothing_is_written_when_nothing_changed(tmp_path: Path) -> None:
    atomic.write(tmp_path, files(a="1"))
    before = os.readlink(tmp_path / "..data")
    assert not atomic.write(tmp_path, files(a="1"))
    assert os.readlink(tmp_path / "..data") == before


@pytest.mark.parametrize("kind", ["DirectoryOrCreate", "FileOrCreate"])
def test_a_host_path_is_made_if_its_type_says_so(tmp_path: Path, kind: str) -> None:
    path = volumes.host_path({"path": str(tmp_path / "new"), "type": kind})
    assert path.is_dir() is (kind == "DirectoryOrCreate")
    assert volumes.host_path({"path": str(path), "type": kind}) == path


@pytest.mark.parametrize("kind", ["Directory", "File", "Socket", "CharDevice", "BlockDevice"])
def test_a_host_path_that_is_not_there_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(VolumeError, match="hostPath type check failed"):
        volumes.host_path({"path": str(tmp_path / "none"), "type": kind})


def test_a_host_path_has_to_be_what_its_type_says(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        assert volumes.host_path({"path": str(path), "type": "Socket"}) == path
    with pytest.raises(VolumeError, match="is not a directory"):
        volumes.host_path({"path": str(path), "type": "DirectoryOrCreate"})
    assert volumes.host_path({"path": "/dev/null", "type": "CharDevice"}) == Path("/dev/null")


LOG = b"""\
2026-01-01T00:00:01.000000001Z stdout F one
2026-01-01T00:00:02.000000001Z stdout P tw
2026-01-01T00:00:03.000000001Z stdout F o
2026-01-01T00:00:04.000000001Z stderr F three
2026-01-01T00:00:05.000000001Z stdout F not comple"""


async def read(path: Path, **options: object) -> str:
    wanted = LogOptions("app", **options)  # type: ignore[arg-type]
    return b"".join([piece async for piece in logs.read(path, wanted, lambda: False)]).decode()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "one\ntwo\nthree\n"),
        ({"tail_lines": 2}, "two\nthree\n"),
        ({"tail_lines": 0}, ""),
        ({"tail_lines": 9}, "one\ntwo\nthree\n"),
        ({"limit_bytes": 6}, "one\ntw"),
        ({"since_time": "2026-01-01T00:00:04Z"}, "three\n"),
        ({"timestamps": True, "tail_lines": 1}, "2026-01-01T00:00:04.000000001Z three\n"),
    ],
)
async def test_a_log_is_read_as_it_is_asked_for(tmp_path: Path, options: dict[str, object], expected: str) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(LOG)
    assert await read(path, **options) == expected


async def test_a_followed_log_goes_on_over_a_new_file_until_the_container_ends(tmp_path: Path) -> None:
    path, steps = tmp_path / "0.log", 0
    path.write_bytes(LOG)

    def runs() -> bool:
        nonlocal steps
        steps += 1
        if steps == 1:
            with path.open("ab") as file:
                file.write(b"te\n")
        elif steps == 2:
            path.rename(tmp_path / "0.log.old")
            path.write_bytes(b"2026-01-01T00:00:06.000000001Z stdout F anew\n")
        return steps < 4

    wanted = LogOptions("app", follow=True, tail_lines=1)
    pieces = [piece async for piece in logs.read(path, wanted, runs)]
    assert b"".join(pieces) == b"three\nnot complete\nanew\n"


def test_the_last_lines_of_a_log_are_found(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(LOG)
    assert logs.last_lines(path, 2) == [b"three\n", b"not comple"]
    assert logs.last_lines(tmp_path / "none", 2) == []
