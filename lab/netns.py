"""Network namespaces with names, as the `ip` command knows them, and sysctls inside them.

They are bind mounts in /run/netns, made without `ip netns add`: that makes /run/netns a shared mount of its
own and nothing ever undoes it. Nor is `ip netns exec` used: it remounts /sys and hides cgroup2 and bpffs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from undermesh.lab.commands import run
from undermesh.lab.errors import LabError

NETNS_DIR = Path("/run/netns")
CLONE_NEWNET = 0x40000000
_TCP_LISTEN = "0A"

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


def path(name: str) -> Path:
    """Where the netns called `name` is mounted."""
    return NETNS_DIR / name


def create(name: str) -> None:
    """Make an empty netns; only `lo`, down. prepare_directory comes first.

    Raises:
        ToolError: not root, or the name is taken.
    """
    path(name).touch(exist_ok=False)
    run(["unshare", f"--net={path(name)}", "true"])


def delete(name: str) -> None:
    """Unmount a netns; nothing happens if it is gone. It lives on while a process or an FD holds it."""
    if not path(name).exists():
        return
    if path(name).stat().st_dev != NETNS_DIR.stat().st_dev:
        run(["umount", str(path(name))])
    path(name).unlink(missing_ok=True)


def prepare_directory() -> bool:
    """Make /run/netns the shared mount that `ip netns add` would make it; returns whether it was none yet.

    Were it left to somebody's `ip netns add` while ours are there, ours would end up mounted twice, once
    out of reach.
    """
    NETNS_DIR.mkdir(exist_ok=True)
    if _is_mount(NETNS_DIR):
        return False
    run(["mount", "--bind", str(NETNS_DIR), str(NETNS_DIR)])
    run(["mount", "--make-shared", str(NETNS_DIR)])
    return True


def restore_directory() -> bool:
    """Undo prepare_directory, unless there are namespaces of others; returns whether it is done."""
    if _is_mount(NETNS_DIR):
        if any(NETNS_DIR.iterdir()):
            return False
        run(["umount", str(NETNS_DIR)])
    return True


def enter(name: str, argv: list[str]) -> list[str]:
    """The command line that runs `argv` inside the netns, as the same process."""
    return ["nsenter", f"--net={path(name)}", "--", *argv]


def call(name: str, function: Callable[[], T]) -> T:
    """Call `function` in a thread that lives in the netns; the caller's own netns never changes.

    Raises:
        LabError: the netns cannot be entered. What `function` raises comes through.
    """

    def enter_and_call() -> T:
        descriptor = os.open(path(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(descriptor, CLONE_NEWNET) != 0:
                raise LabError(f"netns {name}: cannot enter it: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(descriptor)
        return function()

    # The pool ends with this call, and its only thread, which can serve nobody else now, with it.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(enter_and_call).result()


def set_sysctls(name: str, values: Mapping[str, str]) -> None:
    """Write sysctls inside the netns; keys as in /proc/sys, with slashes."""

    def write() -> None:
        for key, value in values.items():
            Path("/proc/sys", key).write_text(value)

    call(name, write)


def read_sysctl(name: str, key: str) -> str:
    """A sysctl inside the netns; the key as in /proc/sys, with slashes."""
    return call(name, lambda: Path("/proc/sys", key).read_text().strip())


def listeners(name: str) -> dict[int, tuple[str, int]]:
    """The listening TCP sockets of the netns: inode -> (address in the kernel's hex, port)."""

    def read() -> list[str]:
        files = (Path("/proc/thread-self/net/tcp"), Path("/proc/thread-self/net/tcp6"))
        return [line for file in files if file.exists() for line in file.read_text().splitlines()[1:]]

    found = {}
    for line in call(name, read):
        fields = line.split()
        if fields[3] == _TCP_LISTEN:
            address, port = fields[1].split(":")
            found[int(fields[9])] = (address, int(port, 16))
    return found


def listening_ports(name: str) -> set[int]:
    """The TCP ports that something in the netns listens on."""
    return {port for _, port in listeners(name).values()}


def _is_mount(directory: Path) -> bool:
    """Path.is_mount does not see a directory that is bound onto itself."""
    return any(line.split()[4] == str(directory) for line in Path("/proc/self/mountinfo").read_text().splitlines())
