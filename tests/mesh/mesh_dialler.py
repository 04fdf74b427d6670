"""Runs in a pod or on a node: dials what it is told to and prints what came of each. Only the standard library.

python3 mesh_dialler.py '{"NAME": ["HOST", PORT], ...}'
"""

from __future__ import annotations

import json
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PATIENCE = 5.0


def dial(host: str, port: int) -> dict[str, Any]:
    """One connection until the first line; ::ffff:1.2.3.4 is dialled by an IPv6 socket."""
    found: dict[str, Any] = {"answer": None, "error": None, "local": None}
    began = time.monotonic()
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as dialled:
            dialled.settimeout(PATIENCE)
            dialled.connect(address)
            found["local"] = [dialled.getsockname()[0].removeprefix("::ffff:"), dialled.getsockname()[1]]
            line = dialled.makefile().readline()
            found["answer"] = json.loads(line) if line else None
            found["error"] = None if line else "EOF"
    except OSError as error:
        found["error"] = type(error).__name__
    found["seconds"] = time.monotonic() - began
    return found


def main(targets: dict[str, Any]) -> None:
    """All of them, some at a time."""
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda target: dial(*target), targets.values())
        print(json.dumps(dict(zip(targets, results, strict=True))))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
