"""The namespaces of a pod's sandbox: made, kept by bind mounts, removed.

There is no pause process: mounts hold the namespaces, network in /run/netns as every runtime has it, IPC and UTS
in the sandbox's run directory. Only a pod that shares its process namespace gets a first process (see runtime).
"""

from __future__ import annotations

import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from undermesh.lab import netns
from undermesh.lab.runtime import syscalls
from undermesh.lab.runtime.types import RuntimeFault, SandboxConfig

_IPC_SYSCTLS = ("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")
_FLAGS = {"net": syscalls.CLONE_NEWNET, "ipc": syscalls.CLONE_NEWIPC, "uts": syscalls.CLONE_NEWUTS}
_SHM_MODE = 0o1777
# A pod may have IPv6 even if the machine has not; nobody can have its addresses, and to look for one who does
# costs every start two seconds.
_NET_SYSCTLS = {
    **{f"net/ipv6/conf/{name}/disable_ipv6": "0" for name in ("all", "default", "lo")},
    **{f"net/ipv6/conf/{name}/accept_dad": "0" for name in ("all", "default")},
}


def prepare() -> None:
    """Make /run/netns the shared mount that it is on any node, so that who mounts it sees namespaces come and go.

    Raises:
        OSError
    """
    netns.NETNS_DIR.mkdir(exist_ok=True)
    if syscalls.mount_id(str(netns.NETNS_DIR)) != syscalls.mount_id(str(netns.NETNS_DIR.parent)):
        return
    directory = str(netns.NETNS_DIR)
    syscalls.mount(directory, directory, flags=syscalls.MS_BIND)
    syscalls.mount("none", directory, flags=syscalls.MS_SHARED)


def namespace_paths(config: SandboxConfig, directory: Path, net: str) -> dict[str, str]:
    """OCI namespace type -> path, of those that the sandbox has for itself.

    With the node's network comes the node's hostname, as on any node.
    """
    paths = {"network": net, "uts": str(directory / "uts")} if not config.host_network else {}
    if not config.host_ipc:
        paths["ipc"] = str(directory / "ipc")
    return paths


def new_netns_path() -> str:
    """As containerd names one."""
    return str(netns.NETNS_DIR / f"cni-{uuid.uuid4()}")


def check_sysctls(config: SandboxConfig) -> None:
    """Raises RuntimeFault: a sysctl that is not the sandbox's own."""
    for name in config.sysctls:
        allowed = (name.startswith("net.") and not config.host_network) or (
            name.startswith(_IPC_SYSCTLS) and not config.host_ipc
        )
        if not allowed:
            raise RuntimeFault(
                "SysctlForbidden", f"pod {config.namespace}/{config.name}: sysctl {name} is not the pod's own here"
            )


def make(config: SandboxConfig, directory: Path, net: str) -> None:
    """Make namespaces and directories of a sandbox. Blocks for a few milliseconds.

    Raises:
        OSError: what was made stays for `remove`.
    """
    directory.mkdir(parents=True)
    shm = directory / "shm"
    shm.mkdir()
    shm.chmod(_SHM_MODE)
    (directory / "hostname").write_text(config.hostname + "\n")
    paths = namespace_paths(config, directory, net)
    kinds = {"network": "net", "ipc": "ipc", "uts": "uts"}
    targets = {kinds[kind]: path for kind, path in paths.items()}
    if targets:
        _in_thread(lambda: _make_namespaces(config, targets))


def remove(directory: Path, net: str) -> None:
    """Undo `make`, as far as it got. Raises OSError."""
    for path in (Path(net) if net else None, directory / "ipc", directory / "uts"):
        if path is not None:
            _release(path)
    shutil.rmtree(directory, ignore_errors=True)


def _make_namespaces(config: SandboxConfig, targets: Mapping[str, str]) -> None:
    """In a thread of its own, which takes its namespaces with it when it ends."""
    flags = 0
    for kind in targets:
        flags |= _FLAGS[kind]
    syscalls.unshare(flags)
    sysctls = {name.replace(".", "/"): value for name, value in config.sysctls.items()}
    if "uts" in targets:
        socket.sethostname(config.hostname)
    if "net" in targets:
        syscalls.link_up("lo")
        sysctls = {**_NET_SYSCTLS, **sysctls}
    for name, value in sysctls.items():
        try:
            Path("/proc/sys", name).write_text(value)
        except FileNotFoundError:
            if name not in _NET_SYSCTLS:
                raise
    for kind, path in targets.items():
        Path(path).touch(exist_ok=False)
        syscalls.mount(syscalls.thread_namespace(kind), path, flags=syscalls.MS_BIND)


def _in_thread(function: Callable[[], None]) -> None:
    """Run it in a thread that nobody else will use; what it raises comes through."""
    raised: list[OSError] = []

    def run() -> None:
        try:
            function()
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _release(path: Path) -> None:
    syscalls.unmount(str(path))
    path.unlink(missing_ok=True)
