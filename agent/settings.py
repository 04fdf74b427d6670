"""What one agent is told at start: parsed once, passed on as one object."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from undermesh.agent import cgroups
from undermesh.agent.bpf.layout import LAYOUT_VERSION
from undermesh.api import source_option
from undermesh.api.source_option import SourceOption

EXIT_USAGE: Final = 64  # sysexits.h EX_USAGE: the supervisor does not start us again
EXIT_UNAVAILABLE: Final = 69  # EX_UNAVAILABLE: the kernel or the machine lacks something


@dataclass(frozen=True)
class Settings:
    """Settings of the agent.

    Attributes:
        node: the Kubernetes node this agent serves.
        source: where the objects come from.
        run_dir: sockets and state that a restart of the agent survives; a tmpfs.
        state_dir: what a reboot survives: the list of enrolled namespaces.
        pin_dir: our folder in bpffs.
        cgroup_root: the node's root in cgroup2; capture is attached here.
        bpf_dir: the compiled BPF objects.
        control_plane: host:port of CA, discovery and reports.
        control_plane_name: the name in the control plane's certificate.
        ca_root: file with the roots that the control plane and all peers chain to.
        token: file with the agent's pod-bound token.
        cni_plugin: our CNI plugin in the image, to be kept installed on the node; None: somebody else installs it.
        cni_bin_dir: where the container runtime looks for plugins.
        cni_conf_dir: where it looks for network configurations.
        lane_attested: let pods of this node talk without a proxy where L4 policy allows it.
        probe_socket: where this agent alone answers the kubelet's probes; None: nowhere but on its API.
    """

    node: str
    source: SourceOption
    run_dir: Path
    pin_dir: Path
    cgroup_root: Path
    bpf_dir: Path
    control_plane: str
    control_plane_name: str
    ca_root: Path
    token: Path
    trust_domain: str
    cluster: str
    network: str
    root_namespace: str
    log_level: str
    state_dir: Path = Path("/var/lib/undermesh")
    cni_plugin: Path | None = None
    cni_bin_dir: Path = Path("/opt/cni/bin")
    cni_conf_dir: Path = Path("/etc/cni/net.d")
    probe_socket: Path | None = None
    lane_attested: bool = False

    @property
    def pins(self) -> Path:
        return self.pin_dir / f"v{LAYOUT_VERSION}"


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Reads the command line; argparse ends the process on a wrong one."""
    parser = _Parser(prog="undermesh.agent", description="Enrols the pods of one node into the mesh.")
    parser.add_argument("--node", required=True, help="name of the Kubernetes node")
    parser.add_argument("--source", type=_source, required=True, help=source_option.HELP)
    parser.add_argument("--run-dir", type=Path, default=Path("/run/undermesh"))
    parser.add_argument("--state-dir", type=Path, default=Path("/var/lib/undermesh"))
    parser.add_argument("--pin-dir", type=Path, default=Path("/sys/fs/bpf/undermesh"))
    parser.add_argument("--cgroup-root", type=_directory, default=None, help="default: the cgroup2 mount")
    parser.add_argument("--bpf-dir", type=_directory, required=True, help="directory of the BPF objects")
    parser.add_argument("--control-plane", required=True, metavar="HOST:PORT")
    parser.add_argument("--control-plane-name", default="undermesh.undermesh-system.svc")
    parser.add_argument("--ca-root", type=Path, required=True, help="PEM file of the trusted roots")
    parser.add_argument("--token", type=Path, required=True, help="file with the pod-bound token")
    parser.add_argument("--trust-domain", default="cluster.local")
    parser.add_argument("--cluster", default="Kubernetes")
    parser.add_argument("--network", default="")
    parser.add_argument("--root-namespace", default="undermesh-system")
    parser.add_argument("--cni-plugin", type=_file, default=None, help="CNI plugin to keep installed on the node")
    parser.add_argument("--cni-bin-dir", type=Path, default=Path("/opt/cni/bin"), metavar="DIR")
    parser.add_argument("--cni-conf-dir", type=Path, default=Path("/etc/cni/net.d"), metavar="DIR")
    parser.add_argument("--probe-socket", type=Path, default=None, metavar="PATH")
    parser.add_argument(
        "--lane-attested",
        type=_on_or_off,
        default=False,
        metavar="on|off",
        help="let pods of one node talk without a proxy where L4 policy allows it (docs/security.md)",
    )
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    values = vars(parser.parse_args(arguments))
    if values["cgroup_root"] is None:
        try:
            values["cgroup_root"] = cgroups.find_mount()
        except cgroups.CgroupError as e:
            parser.error(str(e))
    return Settings(**values)


class _Parser(argparse.ArgumentParser):
    """Ends with the exit code that tells the supervisor not to try again."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def _source(text: str) -> SourceOption:
    option = source_option.source_option(text)
    if option.kind == "files":
        _directory(str(option.directory))
    return option


def _on_or_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text} is neither on nor off")
    return text == "on"


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return path
