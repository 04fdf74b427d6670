"""The in-pod program itself: its content, and its orders by pipe as in a container."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import pytest

from undermesh.lab.checker import peer
from undermesh.lab.checker.peer import BLOCK, Content, header, read_header
from undermesh.lab.checker.shapes import BANNER, Scale, catalogue, scripts


def test_content_is_the_same_at_both_ends_however_it_is_cut():
    one, other = Content("key", b"token"), Content("key", b"token")
    whole = one.take(3 * BLOCK + 7)
    assert b"".join(other.take(size) for size in (1, BLOCK, BLOCK - 1, 0, BLOCK + 7)) == whole
    assert whole.count(b"token") == 4
    assert Content("other", b"token").take(100) != whole[:100]
    assert len({whole[start : start + 64] for start in range(0, 3 * BLOCK, 64)}) == 3 * BLOCK // 64


def test_a_header_says_which_connection_it_is_and_nothing_else_is_one():
    assert read_header(header(77, True, "short")) == (77, True, "short")
    for bad in (b"GET / HTTP/1.1\r\n", header(1, False, "short")[:-1] + b"x"):
        with pytest.raises(ValueError, match="no header"):
            read_header(bad)


def test_all_shapes_work_by_pipes_and_count_what_the_catalogue_says():
    shapes = catalogue(Scale(seconds=0.3, bulk=1 << 18))
    command = [sys.executable, "-I", "-S", peer.__file__, "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            reports = run_all(process, shapes)
        finally:
            process.kill()
    assert {report["shape"] for report in reports} == shapes.keys()
    for report in reports:
        shape = shapes[report["shape"]]
        if report["side"] == "client" and not shape.abrupt:
            assert report["received"] == shape.down, report
        if report["side"] == "server":
            assert report["received"] == shape.up, report
        assert report["bad_at"] is None


def free_port():
    with socket.socket(socket.AF_INET6) as one:
        one.bind(("::", 0))
        return one.getsockname()[1]


def run_all(process, shapes):
    """One connection of every shape from the peer to itself."""

    def order(do, **arguments):
        process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    modes = {str(shape.mode) for shape in shapes.values()}
    ports = {mode: free_port() for mode in modes}
    listen = {mode: {"port": port} for mode, port in ports.items() if mode != "refused"}
    tokens = {"secret": "um-secret", "open": "um-open"}
    settings = {"seed": 5, "patience": 5.0, "tokens": tokens, "banner": BANNER, "scripts": scripts(shapes.values())}
    assert order("prepare", pod="self", listen=listen, **settings) == {}
    plans = [
        {"id": number, "shape": name, "host": "::1", "port": ports[shape.mode], "at": 0.0, "secret": True}
        for number, (name, shape) in enumerate(shapes.items(), 1)
    ]
    order("start", plans=plans)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        progress = order("progress")
        if progress == {"calls": len(plans), "open": 0}:
            break
        time.sleep(0.05)
    collected = order("collect")
    assert collected["faults"] == []
    return collected["reports"]
