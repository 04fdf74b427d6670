"""Records of enrolled pods survive the agent, and a damaged one harms no other."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from undermesh.agent.pod_record import PodRecord, PodRecords


def record(uid: str = "uid-1", **changes: object) -> PodRecord:
    return PodRecord(uid, "shop", "cart", 7, 4026531840, **changes)  # type: ignore[arg-type]


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = record(sysctls={"ipv4/tcp_fwmark_accept": "0"}, tables={2: 1338, 10: 1339})
    PodRecords(tmp_path).save(saved)
    assert PodRecords(tmp_path).load() == {"uid-1": saved}


def test_saving_again_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    records = PodRecords(tmp_path)
    records.save(record())
    records.save(record(tables={2: 1400}))
    assert records.load()["uid-1"].tables == {2: 1400}
    assert [path.name for path in tmp_path.iterdir()] == ["uid-1.json"]


def test_a_removed_record_is_gone_and_removing_it_twice_is_fine(tmp_path: Path) -> None:
    records = PodRecords(tmp_path)
    records.save(record())
    records.remove("uid-1")
    records.remove("uid-1")
    assert records.load() == {}


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"uid": "x"}', b"\xff\xfe", b'{"uid": 1}'])
def test_a_damaged_record_is_reported_and_the_others_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    records = PodRecords(tmp_path)
    records.save(record("good"))
    (tmp_path / "bad.json").write_bytes(damage)
    with caplog.at_level(logging.ERROR):
        assert set(records.load()) == {"good"}
    assert "bad.json cannot be read" in caplog.text
    assert "enrolled afresh" in caplog.text


def test_records_do_not_share_their_tables(tmp_path: Path) -> None:
    first, second = record("a"), record("b")
    first.tables[2] = 1338
    first.sysctls["x"] = "1"
    assert second.tables == {} and second.sysctls == {}


def test_the_directory_is_the_agents_alone(tmp_path: Path) -> None:
    PodRecords(tmp_path / "pods")
    assert (tmp_path / "pods").stat().st_mode & 0o777 == 0o700
