"""`python -m undermesh.agent.uninstall`: takes undermesh off a node: its CNI plugin, kernel objects and files.

To be run when the agent has stopped and every pod is un-enrolled; the pods' own rules and routes went with that.
What is not named by an option is left alone. With --await it only waits until no pod is enrolled.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from undermesh.agent import cni_files
from undermesh.agent.bpf import node_capture, pod_steering
from undermesh.agent.bpf.layout import LAYOUT_VERSION
from undermesh.agent.bpf.libbpf import BpfError

_EXIT_BUSY = 75  # EX_TEMPFAIL: pods are still enrolled, or the agent still runs
_LOOK_SECONDS = 0.5
_SAY_SECONDS = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="undermesh.agent.uninstall", description=__doc__)
    parser.add_argument("--pin-dir", type=Path, default=Path("/sys/fs/bpf/undermesh"))
    parser.add_argument("--await", action="store_true", dest="await_plain", help="wait until no pod is enrolled, end")
    parser.add_argument("--wait", action="store_true", help="wait until the agent has ended and no pod is enrolled")
    parser.add_argument(
        "--force", action="store_true", help="also while pods are enrolled: their connections in the mesh break"
    )
    parser.add_argument("--cni-bin-dir", type=Path, metavar="DIR", help="where the CNI plugin was installed")
    parser.add_argument("--cni-conf-dir", type=Path, metavar="DIR", help="the CNI configurations that name it")
    parser.add_argument("--cni-cache-dir", type=Path, metavar="DIR", help="libcni's cache: lists of pods that run")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the agent's run directory")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="the agent's state directory")
    options = parser.parse_args()
    if (options.cni_bin_dir is None) != (options.cni_conf_dir is None):
        parser.error("--cni-bin-dir and --cni-conf-dir belong together")
    pins = options.pin_dir / f"v{LAYOUT_VERSION}"
    try:
        if options.await_plain:
            _wait(lambda: _obstacle(pins, None))
            return 0
        if options.wait:
            _wait(lambda: _obstacle(pins, options.run_dir))
        if not options.force and (obstacle := _obstacle(pins, options.run_dir)):
            print(f"undermesh.agent.uninstall: {obstacle} (or use --force)", file=sys.stderr)
            return _EXIT_BUSY
        # First: what starts from here on starts without the mesh, and needs no agent.
        if options.cni_bin_dir is not None:
            for undone in cni_files.remove(options.cni_bin_dir, options.cni_conf_dir, options.cni_cache_dir):
                print(f"took the plugin out of {undone}" if Path(undone).exists() else f"removed {undone}")
        _remove_pins(pins)
        for directory in filter(None, (options.run_dir, options.state_dir)):
            _empty(directory)
    except (BpfError, OSError) as e:
        print(f"undermesh.agent.uninstall: {e}", file=sys.stderr)
        return 1
    return 0


def _obstacle(pins: Path, run_dir: Path | None) -> str:
    """Why it is too early, and what to do; empty: it is not."""
    enrolled = node_capture.enrolled_pods(pins)
    if enrolled:
        return (
            f"{enrolled} pods are still enrolled: remove the label from their namespaces, wait until "
            "`undermesh status` shows them as plain, then run this again"
        )
    if run_dir is not None and _answers(run_dir / "agent.sock"):
        return "the agent still runs on this node: delete DaemonSet undermesh-node first"
    return ""


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def _wait(obstacle: Callable[[], str]) -> None:
    """Returns when nothing is in the way; whoever called ends a wait that is too long."""
    said = -_SAY_SECONDS
    while found := obstacle():
        if time.monotonic() - said >= _SAY_SECONDS:
            print(f"waiting: {found}", file=sys.stderr, flush=True)
            said = time.monotonic()
        time.sleep(_LOOK_SECONDS)


def _remove_pins(pins: Path) -> None:
    if not pins.is_dir():
        print(f"nothing is pinned under {pins}")
        return
    for pod in sorted((pins / "pods").glob("*")):
        pod_steering.remove(pod)
    node_capture.remove(pins)
    pins.parent.rmdir()
    print(f"removed {pins.parent}")


def _empty(directory: Path) -> None:
    """The directory itself may be a mount point; it stays."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    print(f"emptied {directory}")


if __name__ == "__main__":
    sys.exit(main())
