"""The frames of SPDY/3.1, as far as port-forwarding tunnels them through a WebSocket.

https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SYN_STREAM, SYN_REPLY, RST_STREAM, PING, GOAWAY = 1, 2, 3, 6, 7
FIN = 1
"""Flag of a frame after which its sender sends no more on the stream."""
INTERNAL_ERROR = 6
_VERSION = 3
LARGEST_DATA = 1 << 16
"""Bytes in one data frame that we send."""

_WORDS = (
    *("options", "head", "post", "put", "delete", "trace", "accept", "accept-charset", "accept-encoding"),
    *("accept-language", "accept-ranges", "age", "allow", "authorization", "cache-control", "connection"),
    *("content-base", "content-encoding", "content-language", "content-length", "content-location", "content-md5"),
    *("content-range", "content-type", "date", "etag", "expect", "expires", "from", "host", "if-match"),
    *("if-modified-since", "if-none-match", "if-range", "if-unmodified-since", "last-modified", "location"),
    *("max-forwards", "pragma", "proxy-authenticate", "proxy-authorization", "range", "referer", "retry-after"),
    *("server", "te", "trailer", "transfer-encoding", "upgrade", "user-agent", "vary", "via", "warning"),
    *("www-authenticate", "method", "get", "status", "200 OK", "version", "HTTP/1.1", "url", "public", "set-cookie"),
    *("keep-alive", "origin"),
)
_TAIL = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritative "
    "Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 "
    "Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec "
    "00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,"
    "application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8"
    "charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = b"".join(struct.pack(">I", len(word)) + word.encode() for word in _WORDS) + _TAIL.encode()
"""What header blocks are compressed against (section 2.6.10.1); its Adler-32 stands in each stream."""


class SpdyError(Exception):
    """The peer sent what is no SPDY/3.1."""


@dataclass(frozen=True)
class Control:
    """A control frame; `headers` of those that carry some, in lower case."""

    type: int
    flags: int
    stream: int
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Data:
    """A data frame."""

    stream: int
    flags: int
    data: bytes


class Decoder:
    """Bytes in, whole frames out. Header blocks of one connection share a compression state."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)

    def feed(self, data: bytes) -> Iterator[Control | Data]:
        """The frames that `data` completes. Raises SpdyError."""
        self._buffer += data
        while len(self._buffer) >= 8:
            first, second = struct.unpack_from(">II", self._buffer)
            length = second & 0xFFFFFF
            if len(self._buffer) < 8 + length:
                return
            body = bytes(self._buffer[8 : 8 + length])
            del self._buffer[: 8 + length]
            if first & 0x80000000:
                yield self._control(first, second >> 24, body)
            else:
                yield Data(first, second >> 24, body)

    def _control(self, first: int, flags: int, body: bytes) -> Control:
        if (first >> 16) & 0x7FFF != _VERSION:
            raise SpdyError(f"version {(first >> 16) & 0x7FFF} instead of {_VERSION}")
        kind = first & 0xFFFF
        stream = struct.unpack_from(">I", body)[0] & 0x7FFFFFFF if len(body) >= 4 else 0
        skipped = {SYN_STREAM: 10, SYN_REPLY: 4}.get(kind)
        headers = self._headers(body[skipped:]) if skipped is not None else {}
        return Control(kind, flags, stream, headers, body)

    def _headers(self, block: bytes) -> dict[str, str]:
        try:
            plain = self._inflate.decompress(block)
            count, at, found = struct.unpack_from(">I", plain)[0], 4, {}
            for _ in range(count):
                name, at = _string(plain, at)
                found[name.lower()], at = _string(plain, at)
        except (zlib.error, struct.error, UnicodeDecodeError) as error:
            raise SpdyError(f"header block: {error}") from error
        return found


def _string(data: bytes, at: int) -> tuple[str, int]:
    length = struct.unpack_from(">I", data, at)[0]
    return data[at + 4 : at + 4 + length].decode(), at + 4 + length


class Encoder:
    """Frames to bytes."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(zdict=DICTIONARY)

    def _headers(self, headers: Mapping[str, str]) -> bytes:
        plain = struct.pack(">I", len(headers))
        for name, value in headers.items():
            for text in (name.lower().encode(), value.encode()):
                plain += struct.pack(">I", len(text)) + text
        return self._deflate.compress(plain) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def _control(self, kind: int, flags: int, body: bytes) -> bytes:
        return struct.pack(">HHI", 0x8000 | _VERSION, kind, flags << 24 | len(body)) + body

    def syn_stream(self, stream: int, headers: Mapping[str, str], flags: int = 0) -> bytes:
        return self._control(SYN_STREAM, flags, struct.pack(">IIH", stream, 0, 0) + self._headers(headers))

    def syn_reply(self, stream: int, flags: int = 0) -> bytes:
        return self._control(SYN_REPLY, flags, struct.pack(">I", stream) + self._headers({}))

    def rst_stream(self, stream: int, status: int) -> bytes:
        return self._control(RST_STREAM, 0, struct.pack(">II", stream, status))

    def ping(self, body: bytes) -> bytes:
        return self._control(PING, 0, body)

    def data(self, stream: int, data: bytes, flags: int = 0) -> bytes:
        return struct.pack(">II", stream, flags << 24 | len(data)) + data
