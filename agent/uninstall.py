"""`python -m undermesh.agent.uninstall`: takes the node-wide part of undermesh out of the kernel.

To be run when the agent has stopped and every pod is un-enrolled; the pods' own rules and routes went with that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from undermesh.agent.bpf import node_capture, pod_steering
from undermesh.agent.bpf.layout import LAYOUT_VERSION
from undermesh.agent.bpf.libbpf import BpfError

_EXIT_BUSY = 75  # EX_TEMPFAIL: pods are still enrolled


def main() -> int:
    parser = argparse.ArgumentParser(prog="undermesh.agent.uninstall", description=__doc__)
    parser.add_argument("--pin-dir", type=Path, default=Path("/sys/fs/bpf/undermesh"))
    parser.add_argument(
        "--force", action="store_true", help="also while pods are enrolled: their connections in the mesh break"
    )
    options = parser.parse_args()
    pins = options.pin_dir / f"v{LAYOUT_VERSION}"
    try:
        return _uninstall(pins, options.force)
    except (BpfError, OSError) as e:
        print(f"undermesh.agent.uninstall: {e}", file=sys.stderr)
        return 1


def _uninstall(pins: Path, force: bool) -> int:
    if not pins.is_dir():
        print(f"nothing is pinned under {pins}")
        return 0
    enrolled = node_capture.enrolled_pods(pins)
    if enrolled and not force:
        print(
            f"{enrolled} pods are still enrolled: remove the label from their namespaces, wait until "
            "`undermesh status` shows them as plain, then run this again (or use --force)",
            file=sys.stderr,
        )
        return _EXIT_BUSY
    for pod in sorted((pins / "pods").glob("*")):
        pod_steering.remove(pod)
    node_capture.remove(pins)
    pins.parent.rmdir()
    print(f"removed {pins.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
