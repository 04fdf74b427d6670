"""Unix sockets that are root's alone, from the moment they have a name."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def listen(path: Path, backlog: int) -> socket.socket:
    """A stream socket (0600) that accepts at `path`, for an event loop; one that was left there goes.

    Raises:
        OSError: it cannot be made there.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The process's umask: nothing may come in between.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(backlog)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
