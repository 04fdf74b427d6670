"""Relays that each do one thing wrong: python3 -I -S checker_relay.py JSON

JSON is a list of [fault, listen host, target host, source host, port]. A relay listens OFFSET above its port and
connects from the source host, so that the server sees the client's address.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import socket
import struct
import sys
import threading
import time

OFFSET = 10_000
_libc = ctypes.CDLL(None)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Way:
    """One direction of a relayed connection."""

    def __init__(self, fault: str, source: socket.socket, target: socket.socket, *, down: bool) -> None:
        self._fault = fault if down else ""
        self._whole = fault
        self._source, self._target = source, target
        self._passed = 0

    def go(self) -> None:
        """Pass everything on until the source ends, and then the end."""
        try:
            while data := self._source.recv(1 << 16):
                self._target.sendall(self._spoil(data))
                self._passed += len(data)
        except OSError as error:
            self._pass_error(error)
            return
        self._pass_end()

    def _spoil(self, data: bytes) -> bytes:
        first = self._passed == 0
        if self._fault == "flip" and first:
            return data[:60] + bytes([data[60] ^ 1]) + data[61:]
        if self._fault == "swap-pieces" and first:
            return data[50:90] + data[:50] + data[90:]
        if self._fault == "lose" and first:
            return data[:40] + data[50:]
        if self._fault == "double" and first:
            return data + data[-1:]
        if self._fault == "stall" and first:
            time.sleep(2.3)
        if self._fault == "cut" and self._passed + len(data) > 100:
            kept = data[: max(0, 100 - self._passed)]
            self._target.sendall(kept)
            self._target.shutdown(socket.SHUT_WR)
            self._fault = "cut-done"
        return b"" if self._fault == "cut-done" else data

    def _pass_end(self) -> None:
        with contextlib.suppress(OSError):
            if self._fault == "fin-to-reset":
                _reset(self._target)
            elif self._fault == "late-end":
                time.sleep(2.3)
                self._target.shutdown(socket.SHUT_WR)
            elif self._whole == "no-half-close":
                self._target.shutdown(socket.SHUT_RDWR)
                self._source.shutdown(socket.SHUT_RDWR)
            elif self._fault != "swallow-end":
                self._target.shutdown(socket.SHUT_WR)

    def _pass_error(self, error: OSError) -> None:
        if error.errno not in (errno.ECONNRESET, errno.EPIPE):
            return
        with contextlib.suppress(OSError):
            if self._whole == "reset-to-fin":
                self._target.shutdown(socket.SHUT_WR)
            else:
                _reset(self._target)
                _reset(self._source)


def _reset(one: socket.socket) -> None:
    """Connect to AF_UNSPEC: the kernel sends a RST at once, even while another thread sits in recv()."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    _libc.connect(one.fileno(), bytes(16), 16)


def serve(fault: str, listen: str, target: str, source: str, port: int) -> None:
    """Relay one port, from OFFSET above it."""
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((listen, port + OFFSET))
    listener.listen(512)
    while True:
        accepted, _ = listener.accept()
        threading.Thread(target=relay, args=(fault, accepted, target, source, port), daemon=True).start()


def relay(fault: str, accepted: socket.socket, target: str, source: str, port: int) -> None:
    """Relay one connection."""
    if fault == "swallow":
        time.sleep(60)
    try:
        onward = socket.create_connection((target, port), 5.0, (source, 0))
    except OSError:
        _reset(accepted)
        return
    onward.settimeout(None)
    up, down = Way(fault, accepted, onward, down=False), Way(fault, onward, accepted, down=True)
    thread = threading.Thread(target=up.go)
    thread.start()
    down.go()
    thread.join()
    accepted.close()
    onward.close()


if __name__ == "__main__":
    threads = [threading.Thread(target=serve, args=arguments) for arguments in json.loads(sys.argv[1])]
    for one in threads:
        one.start()
