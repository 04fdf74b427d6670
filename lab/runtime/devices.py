"""Which devices a container may use: a BPF program on its cgroup, with the rules that runc adds to every container.

The program is loaded once and attached to each cgroup. The runtime program is told of no rules: it would load a
program for each container, and crun wants to raise a limit for that which not every machine's root may raise.

Imported by the shim, so nothing outside of the standard library may be imported here.
"""

from __future__ import annotations

import ctypes
import os
import struct

from undermesh.lab.runtime import syscalls

ALLOWED: tuple[tuple[int, int | None], ...] = (
    (1, 3),  # null
    (1, 5),  # zero
    (1, 7),  # full
    (1, 8),  # random
    (1, 9),  # urandom
    (5, 0),  # tty
    (5, 2),  # ptmx
    (10, 200),  # net/tun
    (136, None),  # pts
)
"""Character devices, major and minor (None: any). Nodes of every device may be made, as runc has it."""

_PROG_LOAD, _PROG_ATTACH = 5, 8
_TYPE_CGROUP_DEVICE, _ATTACH_CGROUP_DEVICE, _ALLOW_MULTI = 15, 6, 2
_MKNOD, _CHARACTER = 1, 2

# Opcodes of linux/bpf.h.
_LOAD_WORD, _MOVE, _SET, _AND, _SHIFT_RIGHT, _JUMP_UNLESS, _EXIT = 0x61, 0xBF, 0xB7, 0x54, 0x74, 0x55, 0x95


def instructions() -> bytes:
    """The program. Pure."""
    context, access, major, minor, kind = 1, 2, 3, 4, 5
    allow = _op(_SET, 0, immediate=1) + _op(_EXIT)
    code = _op(_LOAD_WORD, access, context) + _op(_LOAD_WORD, major, context, 4) + _op(_LOAD_WORD, minor, context, 8)
    code += _op(_MOVE, kind, access) + _op(_AND, kind, immediate=0xFFFF) + _op(_SHIFT_RIGHT, access, immediate=16)
    code += _op(_JUMP_UNLESS, access, offset=2, immediate=_MKNOD) + allow
    rules = b"".join(_rule(major, number, minor, second, allow) for number, second in ALLOWED)
    code += _op(_JUMP_UNLESS, kind, offset=len(rules) // 8, immediate=_CHARACTER) + rules
    return code + _op(_SET, 0, immediate=0) + _op(_EXIT)


def _rule(major: int, number: int, minor: int, second: int | None, allow: bytes) -> bytes:
    if second is None:
        return _op(_JUMP_UNLESS, major, offset=2, immediate=number) + allow
    both = _op(_JUMP_UNLESS, major, offset=3, immediate=number) + _op(_JUMP_UNLESS, minor, offset=2, immediate=second)
    return both + allow


def _op(code: int, target: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | target, offset, immediate)


class Rules:
    """The loaded program. Raises OSError."""

    def __init__(self) -> None:
        code, licence = ctypes.create_string_buffer(instructions()), ctypes.create_string_buffer(b"Apache-2.0")
        count = (len(code) - 1) // 8
        where = ctypes.addressof(code), ctypes.addressof(licence)
        self._program = syscalls.bpf(_PROG_LOAD, struct.pack("=IIQQ", _TYPE_CGROUP_DEVICE, count, *where))

    def attach(self, cgroup: str) -> None:
        """Make them hold for a cgroup and those below it. Raises OSError."""
        directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            how = _ATTACH_CGROUP_DEVICE, _ALLOW_MULTI
            syscalls.bpf(_PROG_ATTACH, struct.pack("=IIII", directory, self._program, *how))
        finally:
            os.close(directory)
