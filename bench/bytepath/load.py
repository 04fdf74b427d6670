"""The load generator (bench/load) in the pods: a server, and a client that takes orders."""

from __future__ import annotations

import json
import select
import subprocess
from types import TracebackType
from typing import IO, Any

from undermesh.lab.build import Build
from undermesh.lab.cluster import Cluster
from undermesh.lab.errors import LabError

CONTAINER = "load"
PORT = 8080


def argv(build: Build, *words: str) -> list[str]:
    """The command line of the load generator."""
    return [str(build.root / "rust/release/undermesh-load"), *words]


class LoadClient:
    """A client in a pod. Its process lives from order to order: what starting costs is in no figure."""

    def __init__(self, cluster: Cluster, build: Build, pod: str) -> None:
        self._pod = pod
        place = cluster.place(pod, CONTAINER)
        place.cgroup.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            place.command(argv(build, "client")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=place.environment(),
        )

    def __enter__(self) -> LoadClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in self._pipes():
            pipe.close()

    def order(self, *words: object, seconds: float = 120.0) -> dict[str, Any]:
        """Have an order carried out, and return its answer.

        Raises:
            LabError: it failed, or took longer than `seconds`.
        """
        stdin, stdout = self._pipes()
        line = " ".join(map(str, words))
        stdin.write(f"{line}\n".encode())
        stdin.flush()
        if not select.select([stdout], [], [], seconds)[0]:
            raise LabError(f"load in {self._pod}: {line}: no answer in {seconds:g} s; is its server there?")
        text = stdout.readline()
        if not text:
            raise LabError(f"load in {self._pod}: {line}: the client ended; its last words are above")
        answer = json.loads(text)
        if "error" in answer:
            raise LabError(f"load in {self._pod}: {line}: {answer['error']}")
        return dict(answer)

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        return self._process.stdin, self._process.stdout
