"""`python -S -m undermesh.agent.probe live|ready`: the kubelet's question to the agent, whose API is no TCP port.

Exit code 0: yes; 1: no, and the reason on standard error. Needs nothing but the standard library: it runs often.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

RUN_DIR = Path("/run/undermesh")
_TIMEOUT_S = 5.0


def main() -> int:
    question, *run_dir = sys.argv[1:]
    path = Path(run_dir[0]) if run_dir else RUN_DIR
    try:
        head, _, body = _ask(path / "agent.sock", question).partition(b"\r\n\r\n")
    except OSError as e:
        print(f"the agent does not answer at {path / 'agent.sock'}: {e}", file=sys.stderr)
        return 1
    if b" 200 " in head.split(b"\r\n")[0]:
        return 0
    print(body.decode(errors="replace").strip() or "no answer", file=sys.stderr)
    return 1


def _ask(path: Path, question: str) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(f"GET /v1/{question} HTTP/1.0\r\nHost: agent\r\n\r\n".encode())
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
        return answer


if __name__ == "__main__":
    sys.exit(main())
