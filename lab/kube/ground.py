"""What a cluster stands on: its file system, the switch, and the nodes. No Kubernetes yet.

with Ground("test", nodes=1) as ground:
    ground.nodes["node1"].run(["ip", "addr"])
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from undermesh.lab import cgroups, netns
from undermesh.lab.build import Build
from undermesh.lab.commands import ip_batch, run
from undermesh.lab.errors import LabError, PreconditionError
from undermesh.lab.footprint import Claim, clean_up_after_crashes
from undermesh.lab.kube import plan
from undermesh.lab.kube.layout import ClusterLayout
from undermesh.lab.kube.node import Node
from undermesh.lab.network import NODE_SYSCTLS

TOOLS = {
    "ip": "iproute2",
    "nft": "nftables",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
    "awk": "mawk",
    "crun": "crun",
}
"""Program -> Debian package."""
_WRONG_COMMAND_LINE = 2
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?")


def check_machine() -> None:
    """Root, tools and file systems that nodes need.

    Raises:
        PreconditionError: the first thing that is missing.
    """
    if os.geteuid() != 0:
        raise PreconditionError("the lab makes namespaces and needs root: use sudo", os.EX_NOPERM)
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise PreconditionError(f"{tool} is not installed: apt-get install {package}")
    cgroups.mount_point()


class Ground:
    """Start and stop it, or use it as a context manager. Raises LabError, PreconditionError.

    With `named`, `undermesh lab` finds it, and no other can have its name at the time.
    """

    def __init__(self, name: str, nodes: int = 2, *, build: Build | None = None, named: bool = False) -> None:
        if not _NAME.fullmatch(name):
            text = f"lab name {name!r}: use at most 32 lower-case letters, digits and dashes"
            raise PreconditionError(text, _WRONG_COMMAND_LINE)
        if not 1 <= nodes <= plan.MOST_NODES:
            raise LabError(f"lab {name}: {nodes} nodes: it can have 1 to {plan.MOST_NODES}")
        check_machine()
        built = build or Build.of_this_package()
        built.check_network()
        prefix = f"um-{secrets.token_hex(2)}"
        self.layout: ClusterLayout = plan.layout(
            name=name, prefix=prefix, nodes=nodes, build=built.root, cgroup_mount=cgroups.mount_point()
        )
        self.nodes = {node.name: Node(self.layout, node) for node in self.layout.nodes}
        self._footprint = plan.footprint(self.layout, named=named)
        self._claim: Claim | None = None

    @property
    def layout_file(self) -> Path:
        """What each process of the cluster gets as --layout."""
        return self.layout.directory / "layout.json"

    @property
    def switch(self) -> str:
        """The netns of the switch."""
        return plan.switch_netns(self.layout)

    def start(self) -> None:
        """Make everything and boot the nodes; nothing stays if it fails."""
        self.prepare()
        try:
            self.boot()
        except BaseException:
            self.stop()
            raise

    def prepare(self) -> None:
        """Clean up after killed labs, and make the file system and the switch; nothing stays if it fails."""
        clean_up_after_crashes()
        self._claim = Claim(self._footprint)
        try:
            directory = self.layout.directory
            directory.mkdir(mode=0o755)
            run(["mount", "-t", "tmpfs", "-o", "mode=755", self.layout.prefix, str(directory)])
            # The machine may share mounts with others; what the lab mounts here is only the nodes' business.
            run(["mount", "--make-private", str(directory)])
            self.layout.save(self.layout_file)
            netns.create(self.switch)
            netns.set_sysctls(self.switch, NODE_SYSCTLS)
            ip_batch(self.switch, plan.switch_commands(self.layout))
        except BaseException:
            self.stop()
            raise

    def boot(self) -> None:
        """Boot all nodes, several at a time."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(Node.boot, self.nodes.values()))

    def stop(self) -> None:
        """Kill every process and remove every trace. Raises LabError if something stays."""
        if self._claim is not None:
            claim, self._claim = self._claim, None
            claim.release()

    def __enter__(self) -> Ground:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
