"""Whether the demo can run here: asked first, answered in one line."""

from __future__ import annotations

import os
import shutil

from undermesh.lab import cgroups
from undermesh.lab.build import Build
from undermesh.lab.errors import PreconditionError

TOOLS = {
    "ip": "iproute2",
    "nft": "nftables",
    "bpftool": "bpftool (Debian), linux-tools-generic (Ubuntu)",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
}


def check(build: Build) -> None:
    """Root, tools, cgroup2, a build.

    Raises:
        PreconditionError: the first thing that is missing.
    """
    if os.geteuid() != 0:
        raise PreconditionError(
            "the demo makes network namespaces and needs root: run `make demo` as root or with sudo installed",
            os.EX_NOPERM,
        )
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise PreconditionError(f"{tool} is not installed: apt-get install {package}")
    cgroups.mount_point()
    build.check()
