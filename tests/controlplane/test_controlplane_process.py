"""`python -m undermesh.controlplane` as a process: starts, serves, says what is wrong in one line, ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from controlplane_harness import ISSUER, World, load, sign, until

from undermesh.agent.control import ControlPlane

WEB = "spiffe://cluster.local/ns/shop/sa/web"


def arguments(world: World, **changes: str | None) -> list[str]:
    options = {
        "source": str(world.source),
        "state": str(world.state),
        "listen": f"127.0.0.1:{world.port}",
        "token-jwks": str(world.jwks),
        "token-issuer": ISSUER,
        "root-bundle-out": str(world.bundle),
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    given = [text for name, value in options.items() if value is not None for text in (f"--{name}", value)]
    return [sys.executable, "-m", "undermesh.controlplane", *given]


async def answered(control: ControlPlane) -> list[str]:
    async with control.channel() as channel, asyncio.timeout(20):
        await channel.channel_ready()
    return await sign(control, WEB)


async def test_it_signs_serves_metrics_and_ends_on_sigterm(world: World, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics = free.getsockname()[1]
    command = arguments(world, metrics=f"127.0.0.1:{metrics}", log_format="json")
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stderr=output)
        try:
            await until(world.bundle.exists, seconds=30)
            async with world.control("node-a") as control:
                assert load((await answered(control))[0])
            page = await asyncio.to_thread(_get, f"http://127.0.0.1:{metrics}/metrics")
            assert 'undermesh_ca_requests_total{result="signed"} 1.0' in page
            assert 'undermesh_xds_resources{type="type.googleapis.com/istio.workload.Address"} 2.0' in page
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"time", "level", "logger", "message"} <= lines[0].keys()
    assert any("signed spiffe://" in line["message"] for line in lines)
    assert stat.S_IMODE(world.bundle.stat().st_mode) == 0o644


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        return str(response.read().decode())


def _unusable(world: World) -> dict[str, tuple[dict[str, str | None], int, str]]:
    broken = world.root / "broken.json"
    broken.write_text("{")
    symmetric = world.root / "symmetric.json"
    symmetric.write_text('{"keys": [{"kty": "oct", "kid": "k", "k": "c2VjcmV0"}]}')
    empty = world.root / "empty.json"
    empty.write_text('{"keys": []}')
    file = world.root / "file"
    file.write_text("")
    return {
        "no source": ({"source": None}, 64, "--source"),
        "source is missing": ({"source": str(world.root / "nowhere")}, 78, "--source"),
        "no port": ({"listen": "127.0.0.1"}, 64, "is not IP:PORT"),
        "IPv6 without brackets": ({"listen": "::1:15012"}, 64, "brackets"),
        "not our address": ({"listen": "192.0.2.1:15012"}, 78, "--listen"),
        "no JWKS": ({"token_jwks": str(world.root / "nowhere")}, 78, "--token-jwks"),
        "broken JWKS": ({"token_jwks": str(broken)}, 78, "broken.json"),
        "symmetric key": ({"token_jwks": str(symmetric)}, 78, "key k"),
        "JWKS without keys": ({"token_jwks": str(empty)}, 78, "holds no signature key"),
        "state is a file": ({"state": str(file)}, 78, str(file)),
        "bundle cannot be written": ({"root_bundle_out": str(file / "x")}, 78, "--root-bundle-out"),
        "metrics not ours": ({"metrics": "192.0.2.1:80"}, 78, "--metrics"),
    }


CASES = (
    "no source",
    "source is missing",
    "no port",
    "IPv6 without brackets",
    "not our address",
    "no JWKS",
    "broken JWKS",
    "symmetric key",
    "JWKS without keys",
    "state is a file",
    "bundle cannot be written",
    "metrics not ours",
)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_setting_ends_it_with_one_line_that_names_it(world: World, name: str) -> None:
    changes, code, text = _unusable(world)[name]
    done = subprocess.run(
        arguments(world, log_level="error", **changes), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("undermesh-controlplane:")]
    assert len(lines) == 1 and text in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named(world: World) -> None:
    with socket.create_server(("127.0.0.1", world.port)):
        done = subprocess.run(arguments(world), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78
    assert f"cannot listen on 127.0.0.1:{world.port}" in done.stderr
