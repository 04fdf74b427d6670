"""The log of a container: format, partial lines, turning over. Frames of attached clients."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from undermesh.lab.runtime.framing import Frames, pack
from undermesh.lab.runtime.logfile import LINE_LIMIT, CriLog, stamp


def _entries(path: Path) -> list[tuple[str, str, str]]:
    return [
        (stream, tag, text) for _, stream, tag, text in (line.split(" ", 3) for line in path.read_text().splitlines())
    ]


def test_a_stamp_is_rfc_3339_with_nanoseconds() -> None:
    assert stamp(1_700_000_000_000_000_007) == b"2023-11-14T22:13:20.000000007Z"


def test_lines_are_whole_however_they_come(tmp_path: Path) -> None:
    log = CriLog(str(tmp_path / "new" / "0.log"))
    for piece in (b"a", b"b\nc", b"\n\n"):
        log.write(b"stdout", piece)
    log.write(b"stderr", b"e\n")
    log.close()
    assert _entries(tmp_path / "new" / "0.log") == [
        ("stdout", "F", "ab"),
        ("stdout", "F", "c"),
        ("stdout", "F", ""),
        ("stderr", "F", "e"),
    ]


@pytest.mark.parametrize("chunk", [1000, LINE_LIMIT, 3 * LINE_LIMIT])
def test_a_long_line_is_several_partial_entries(tmp_path: Path, chunk: int) -> None:
    line = b"x" * (2 * LINE_LIMIT + 5) + b"\n"
    log = CriLog(str(tmp_path / "0.log"))
    for start in range(0, len(line), chunk):
        log.write(b"stdout", line[start : start + chunk])
    log.close()
    entries = _entries(tmp_path / "0.log")
    assert [(tag, len(text)) for _, tag, text in entries] == [("P", LINE_LIMIT), ("P", LINE_LIMIT), ("F", 5)]


def test_what_has_no_end_is_written_as_partial_when_the_container_ends(tmp_path: Path) -> None:
    log = CriLog(str(tmp_path / "0.log"))
    log.write(b"stdout", b"prompt> ")
    assert _entries(tmp_path / "0.log") == []
    log.close()
    assert _entries(tmp_path / "0.log") == [("stdout", "P", "prompt> ")]


def test_a_log_is_turned_over_and_the_oldest_goes(tmp_path: Path) -> None:
    log = CriLog(str(tmp_path / "0.log"), max_bytes=1000, max_files=3)
    for number in range(100):
        log.write(b"stdout", b"%03d %s\n" % (number, b"y" * 60))
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) <= 3 and "0.log" in files
    assert all(path.stat().st_size < 1200 for path in tmp_path.iterdir())
    texts = [text for name in [*files[1:], files[0]] for _, _, text in _entries(tmp_path / name)]
    assert texts[-1].startswith("099") and texts == sorted(texts)


def test_an_existing_log_is_continued(tmp_path: Path) -> None:
    for word in (b"one\n", b"two\n"):
        log = CriLog(str(tmp_path / "0.log"))
        log.write(b"stdout", word)
        log.close()
    assert [text for _, _, text in _entries(tmp_path / "0.log")] == ["one", "two"]


def test_dev_null_takes_everything() -> None:
    log = CriLog("/dev/null", max_bytes=10)
    log.write(b"stdout", b"a long line, longer than the limit\n")
    log.close()
    assert Path("/dev/null").is_char_device()


@given(some.lists(some.tuples(some.integers(0, 5), some.binary(max_size=50))), some.integers(1, 30))
def test_frames_come_out_as_they_went_in(frames: list[tuple[int, bytes]], chunk: int) -> None:
    data = b"".join(pack(kind, payload) for kind, payload in frames)
    reader = Frames()
    found = [frame for start in range(0, len(data), chunk) for frame in reader.feed(data[start : start + chunk])]
    assert found == frames
