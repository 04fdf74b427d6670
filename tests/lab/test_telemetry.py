"""What is read from an access log and from metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from undermesh.lab.demo import telemetry
from undermesh.lab.errors import LabError

METRICS = """\
# TYPE istio_tcp_connections_failed_total counter
istio_tcp_connections_failed_total{reporter="destination",response_flags="DENY",source_principal="a\\"b"} 3
istio_tcp_connections_failed_total{reporter="source",response_flags="DENY"} 2
istio_tcp_connections_failed_total{reporter="destination",response_flags="CONNECT"} 7
istio_tcp_connections_failed_total_other{response_flags="DENY"} 100
"""


@pytest.mark.parametrize(
    ("labels", "total"),
    [
        ({"response_flags": "DENY"}, 5),
        ({"response_flags": "DENY", "reporter": "source"}, 2),
        ({"response_flags": "TLS_FAILURE"}, 0),
        ({}, 12),
    ],
)
def test_samples_are_summed_by_label(labels: dict[str, str], total: float) -> None:
    assert telemetry.total(METRICS, "istio_tcp_connections_failed_total", labels) == total


def test_only_whole_lines_after_the_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "access.json"
    log = telemetry.AccessLog(path)
    assert log.entries() == []
    path.write_text('{"n": 1}\n')
    log.mark()
    with path.open("a") as file:
        file.write('{"n": 2}\n{"n": 3')
    assert log.entries() == [{"n": 2}]
    path.write_text("no JSON\n" * 9)
    with pytest.raises(LabError, match="a line is no JSON"):
        log.entries()


def test_of_a_containers_log_only_standard_output_is_read(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_text(
        '2026-01-01T00:00:00.000000000Z stdout F {"n": 1}\n'
        "2026-01-01T00:00:00.000000001Z stderr F no JSON\n"
        '2026-01-01T00:00:00.000000002Z stdout F {"n": "a b"}\n'
    )
    assert telemetry.AccessLog(path).entries() == [{"n": 1}, {"n": "a b"}]
