"""A thin ctypes binding of libbpf: objects, maps, links, pins.

Every call that fails raises BpfError, which names the object, the cause and, for the verifier, its last words.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Final

_P = ctypes.c_void_p
_INT = ctypes.c_int
_U32 = ctypes.c_uint32
_U64 = ctypes.c_uint64
_STR = ctypes.c_char_p

# How much of a verifier log an error shows; the whole log stays on the exception.
_LOG_LINES_SHOWN: Final = 6
_BATCH: Final = 1024
_LOG_INFO: Final = 1  # enum libbpf_print_level; what lies above is for who debugs libbpf


class AttachType(IntEnum):
    """enum bpf_attach_type, as far as it is used here."""

    CGROUP_SOCK_OPS = 3
    CGROUP_INET4_BIND = 8
    CGROUP_INET6_BIND = 9
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_SETSOCKOPT = 22
    SK_LOOKUP = 36


class BpfError(Exception):
    """The kernel or libbpf refused something; `errno` is 0 where there is none, `log` the whole verifier log."""

    def __init__(self, what: str, errno: int = 0, log: str = "") -> None:
        self.errno = errno
        self.log = log
        cause = f": {os.strerror(errno)} (errno {errno})" if errno else ""
        super().__init__(what + cause + _shown(log))


def _shown(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith(("processed ", "--"))]
    if not lines:
        return ""
    cut = len(lines) - _LOG_LINES_SHOWN
    head = [f"  ({cut} earlier lines)"] if cut > 0 else []
    return "\n" + "\n".join(head + ["  " + line for line in lines[-_LOG_LINES_SHOWN:]])


class _Lib:
    """The library's functions with their types; loaded on first use."""

    def __init__(self) -> None:
        try:
            self.c = ctypes.CDLL("libbpf.so.1", use_errno=True)
        except OSError as e:
            raise BpfError(f"libbpf.so.1 cannot be loaded ({e}): install package libbpf1") from e
        self._declare()
        self._log: list[str] = []
        printer = ctypes.CFUNCTYPE(_INT, _INT, _STR, _P)
        libc = ctypes.CDLL(None)
        libc.vsnprintf.argtypes = [_P, ctypes.c_size_t, _STR, _P]

        def collect(level: int, message: bytes, arguments: int) -> int:
            if level > _LOG_INFO:
                return 0
            buffer = ctypes.create_string_buffer(65536)
            libc.vsnprintf(buffer, len(buffer), message, arguments)
            self._log.append(buffer.value.decode(errors="replace"))
            return 0

        self._printer = printer(collect)  # must outlive the library's use of it
        self.c.libbpf_set_print(self._printer)

    def _declare(self) -> None:
        signatures: dict[str, tuple[object, list[object]]] = {
            "bpf_object__open_file": (_P, [_STR, _P]),
            "bpf_object__load": (_INT, [_P]),
            "bpf_object__close": (None, [_P]),
            "bpf_object__find_program_by_name": (_P, [_P, _STR]),
            "bpf_object__find_map_by_name": (_P, [_P, _STR]),
            "bpf_program__fd": (_INT, [_P]),
            "bpf_map__fd": (_INT, [_P]),
            "bpf_map__reuse_fd": (_INT, [_P, _INT]),
            "bpf_map__set_initial_value": (_INT, [_P, _P, ctypes.c_size_t]),
            "bpf_link_create": (_INT, [_INT, _INT, _U32, _P]),
            "bpf_link_update": (_INT, [_INT, _INT, _P]),
            "bpf_link_detach": (_INT, [_INT]),
            "bpf_obj_get": (_INT, [_STR]),
            "bpf_obj_pin": (_INT, [_INT, _STR]),
            "bpf_obj_get_info_by_fd": (_INT, [_INT, _P, ctypes.POINTER(_U32)]),
            "bpf_prog_get_fd_by_id": (_INT, [_U32]),
            "bpf_map_update_elem": (_INT, [_INT, _P, _P, _U64]),
            "bpf_map_lookup_elem": (_INT, [_INT, _P, _P]),
            "bpf_map_delete_elem": (_INT, [_INT, _P]),
            "bpf_map_get_next_key": (_INT, [_INT, _P, _P]),
            "bpf_map_lookup_batch": (_INT, [_INT, _P, _P, _P, _P, ctypes.POINTER(_U32), _P]),
            "libbpf_set_print": (_P, [_P]),
            "libbpf_num_possible_cpus": (_INT, []),
            "bpf_prog_test_run_opts": (_INT, [_INT, _P]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.c, name)
            function.restype = result
            function.argtypes = arguments

    def take_log(self) -> str:
        text, self._log = "".join(self._log), []
        return text


_loaded: list[_Lib] = []


def _lib() -> _Lib:
    if not _loaded:
        _loaded.append(_Lib())
    return _loaded[0]


def _check(result: int, what: str) -> int:
    """libbpf returns -errno or -1 with errno set; both become BpfError."""
    if result >= 0:
        return result
    errno = -result if result != -1 else ctypes.get_errno()
    raise BpfError(what, errno, _lib().take_log())


class Map:
    """A BPF map by FD; keys and values are bytes of the map's own sizes."""

    def __init__(self, fd: int, name: str, key_size: int, value_size: int) -> None:
        self.fd = fd
        self.name = name
        self.key_size = key_size
        self.value_size = value_size

    @classmethod
    def pinned(cls, path: Path) -> Map:
        """Opens a pinned map.

        Raises:
            BpfError: nothing is pinned there, or it is no map.
        """
        return cls.from_fd(obj_get(path), path.name)

    @classmethod
    def from_fd(cls, fd: int, name: str) -> Map:
        info = _object_info(fd, 80, f"map {name}")
        _type, _id, key_size, value_size = struct.unpack_from("IIII", info)
        return cls(fd, name, key_size, value_size)

    def update(self, key: bytes, value: bytes) -> None:
        _check(
            _lib().c.bpf_map_update_elem(self.fd, self._key(key), self._buffer(value, self.value_size), 0),
            f"map {self.name}: cannot write key {key.hex()}",
        )

    def lookup(self, key: bytes) -> bytes | None:
        buffer = ctypes.create_string_buffer(self.value_size)
        if _lib().c.bpf_map_lookup_elem(self.fd, self._key(key), buffer) < 0:
            return None
        return buffer.raw

    def lookup_per_cpu(self, key: bytes) -> list[bytes]:
        """The value of each possible CPU, each padded to 8 bytes by the kernel."""
        padded = (self.value_size + 7) // 8 * 8
        cpus = _check(_lib().c.libbpf_num_possible_cpus(), "number of CPUs")
        buffer = ctypes.create_string_buffer(padded * cpus)
        _check(_lib().c.bpf_map_lookup_elem(self.fd, self._key(key), buffer), f"map {self.name}: cannot read")
        return [buffer.raw[i * padded : i * padded + self.value_size] for i in range(cpus)]

    def delete(self, key: bytes) -> bool:
        """Whether the key was there."""
        return bool(_lib().c.bpf_map_delete_elem(self.fd, self._key(key)) == 0)

    def __iter__(self) -> Iterator[bytes]:
        """The keys present when the walk passes; entries may come and go meanwhile."""
        previous: ctypes.Array[ctypes.c_char] | None = None
        while True:
            following = ctypes.create_string_buffer(self.key_size)
            if _lib().c.bpf_map_get_next_key(self.fd, previous, following) < 0:
                return
            yield following.raw
            previous = following

    def entries(self) -> dict[bytes, bytes]:
        """A hash map's entries, in few calls; those that come and go meanwhile may be missing.

        Raises:
            BpfError: the map is no hash map.
        """
        found: dict[bytes, bytes] = {}
        size = _BATCH
        position: ctypes.Array[ctypes.c_char] | None = None
        while True:
            following = ctypes.create_string_buffer(max(4, self.key_size))
            keys, values = (ctypes.create_string_buffer(size * each) for each in (self.key_size, self.value_size))
            count = _U32(size)
            result = _lib().c.bpf_map_lookup_batch(
                self.fd, position, following, keys, values, ctypes.byref(count), None
            )
            code = ctypes.get_errno() if result == -1 else -result
            if code == errno.ENOSPC:  # more in one bucket of the map than there was room for
                size *= 2
                continue
            if code not in (0, errno.ENOENT):
                raise BpfError(f"map {self.name}: cannot be read", code)
            found_keys, found_values = keys.raw, values.raw
            for i in range(count.value):
                key = found_keys[i * self.key_size : (i + 1) * self.key_size]
                found[key] = found_values[i * self.value_size : (i + 1) * self.value_size]
            if code == errno.ENOENT:
                return found
            position = following

    def pin(self, path: Path) -> None:
        obj_pin(self.fd, path)

    def close(self) -> None:
        os.close(self.fd)

    def _key(self, key: bytes) -> ctypes.Array[ctypes.c_char]:
        return self._buffer(key, self.key_size)

    def _buffer(self, data: bytes, size: int) -> ctypes.Array[ctypes.c_char]:
        if len(data) != size:
            raise ValueError(f"map {self.name}: {len(data)} bytes where {size} belong")
        return ctypes.create_string_buffer(data, size)


class Object:
    """A compiled BPF object: open, set constants and shared maps, load, then take programs and maps by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._programs: dict[str, int] = {}
        lib = _lib()
        self._object = lib.c.bpf_object__open_file(os.fsencode(path), None)
        if not self._object:
            raise BpfError(f"{path}: cannot be opened as a BPF object", ctypes.get_errno(), lib.take_log())

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_constants(self, data: bytes) -> None:
        """Fills .rodata; the size must be that of the section."""
        _check(
            _lib().c.bpf_map__set_initial_value(self._map(".rodata"), data, len(data)),
            f"{self.path.name}: cannot set the constants ({len(data)} bytes)",
        )

    def reuse_map(self, name: str, existing: Map) -> None:
        _check(
            _lib().c.bpf_map__reuse_fd(self._map(name), existing.fd),
            f"{self.path.name}: map {name} cannot be reused",
        )

    def load(self) -> None:
        """Loads every program.

        Raises:
            BpfError: the verifier or the kernel refused one; the message holds the verifier's last lines.
        """
        lib = _lib()
        lib.take_log()
        _check(lib.c.bpf_object__load(self._object), f"{self.path.name}: the kernel refused it")

    def program_fd(self, name: str) -> int:
        """The FD stays the object's: valid until close()."""
        program = _lib().c.bpf_object__find_program_by_name(self._object, name.encode())
        if not program:
            raise BpfError(f"{self.path.name}: no program {name}")
        return _check(_lib().c.bpf_program__fd(program), f"{self.path.name}: program {name}")

    def map(self, name: str) -> Map:
        """A map with an FD of its own, which outlives the object."""
        fd = _check(_lib().c.bpf_map__fd(self._map(name)), f"{self.path.name}: map {name}")
        return Map.from_fd(os.dup(fd), name)

    def close(self) -> None:
        if self._object:
            _lib().c.bpf_object__close(self._object)
            self._object = None

    def _map(self, name: str) -> int:
        found = _lib().c.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            # .rodata of an object is named after the file in the kernel, and found under its section here.
            raise BpfError(f"{self.path.name}: no map {name}")
        return int(found)


class LinkInfo:
    """Where a link is attached: `target` is a cgroup id or a netns inode, 0 when it was detached."""

    def __init__(self, fd: int) -> None:
        info = _object_info(fd, 64, "link")
        self.type, self.id, self.program_id = struct.unpack_from("III", info)
        if self.type == _LINK_CGROUP:
            self.target, self.attach_type = struct.unpack_from("QI", info, 16)
        elif self.type == _LINK_NETNS:
            self.target, self.attach_type = struct.unpack_from("II", info, 16)
        else:
            self.target, self.attach_type = 0, 0


_LINK_CGROUP: Final = 3
_LINK_NETNS: Final = 5


def link_create(program_fd: int, target_fd: int, attach_type: AttachType, what: str) -> int:
    """Attaches and returns the link's FD; `what` names program and target in errors."""
    return _check(_lib().c.bpf_link_create(program_fd, target_fd, int(attach_type), None), f"cannot attach {what}")


def link_update(link_fd: int, program_fd: int, what: str) -> None:
    """Replaces the program of a link in place: no packet sees neither."""
    _check(_lib().c.bpf_link_update(link_fd, program_fd, None), f"cannot update {what}")


def link_detach(link_fd: int, what: str) -> None:
    _check(_lib().c.bpf_link_detach(link_fd), f"cannot detach {what}")


def obj_get(path: Path) -> int:
    return _check(_lib().c.bpf_obj_get(os.fsencode(path)), f"nothing usable is pinned at {path}")


def obj_pin(fd: int, path: Path) -> None:
    _check(_lib().c.bpf_obj_pin(fd, os.fsencode(path)), f"cannot pin {path}: is bpffs mounted there?")


def program_tag(fd: int) -> bytes:
    """The kernel's hash of a program's instructions."""
    return bytes(_object_info(fd, 24, "program")[8:16])


def program_info(fd: int, size: int) -> bytes:
    """The head of struct bpf_prog_info."""
    return _object_info(fd, size, "program")


def program_by_id(program_id: int) -> int:
    """An FD of a loaded program."""
    return _check(_lib().c.bpf_prog_get_fd_by_id(program_id), f"program {program_id}")


def program_tag_by_id(program_id: int) -> bytes:
    fd = program_by_id(program_id)
    try:
        return program_tag(fd)
    finally:
        os.close(fd)


class _TestRunOptions(ctypes.Structure):
    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("data_in", _P),
        ("data_out", _P),
        ("data_size_in", _U32),
        ("data_size_out", _U32),
        ("ctx_in", _P),
        ("ctx_out", _P),
        ("ctx_size_in", _U32),
        ("ctx_size_out", _U32),
        ("retval", _U32),
        ("repeat", _INT),
        ("duration", _U32),
        ("flags", _U32),
        ("cpu", _U32),
        ("batch_size", _U32),
    ]


def test_run(program_fd: int, context: bytes) -> tuple[int, bytes]:
    """BPF_PROG_TEST_RUN with a context; returns the program's result and the context after it."""
    given = ctypes.create_string_buffer(context, len(context))
    after = ctypes.create_string_buffer(len(context))
    options = _TestRunOptions(sz=ctypes.sizeof(_TestRunOptions))
    options.ctx_in = ctypes.cast(given, _P)
    options.ctx_size_in = len(context)
    options.ctx_out = ctypes.cast(after, _P)
    options.ctx_size_out = len(context)
    _check(_lib().c.bpf_prog_test_run_opts(program_fd, ctypes.byref(options)), "test run")
    return options.retval, after.raw


def _object_info(fd: int, size: int, what: str) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    length = _U32(size)
    _check(_lib().c.bpf_obj_get_info_by_fd(fd, buffer, ctypes.byref(length)), f"cannot read {what}")
    return buffer.raw
