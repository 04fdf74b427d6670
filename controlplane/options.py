"""The control plane's command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from undermesh.controlplane import errors


class _Parser(argparse.ArgumentParser):
    """One line per mistake, and sysexits' EX_USAGE."""

    def error(self, message: str) -> NoReturn:
        self.exit(os.EX_USAGE, f"{self.prog}: {message}; see --help\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; exits with status 64 and one line when it is wrong."""
    parser = _Parser(
        prog="undermesh-controlplane",
        description="Signs workload identities and streams the state of the mesh to the agents.",
        allow_abbrev=False,
    )
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="Kubernetes objects as YAML files")
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="keys of the CA and node reports")
    parser.add_argument("--listen", type=address, required=True, metavar="IP:PORT", help="gRPC with TLS")
    parser.add_argument("--metrics", type=address, metavar="IP:PORT", help="Prometheus metrics over HTTP")
    parser.add_argument("--token-jwks", type=Path, required=True, metavar="FILE", help="keys of agents' tokens")
    parser.add_argument("--token-issuer", required=True, metavar="ISS", help="issuer of agents' tokens")
    parser.add_argument("--trust-domain", default="cluster.local", metavar="NAME")
    parser.add_argument("--cluster", default="Kubernetes", metavar="NAME", help="cluster id in workload uids")
    parser.add_argument("--root-bundle-out", type=Path, metavar="FILE", help="write the trusted roots here")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return parser.parse_args(arguments)


def address(text: str) -> str:
    """IP:PORT, as an argparse type; IPv6 in brackets."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not IP:PORT")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise argparse.ArgumentTypeError(f"{text!r}: write an IPv6 address in brackets, [::1]:15012")
    return text


def split(text: str) -> tuple[str, int]:
    """Host without brackets, and port."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def check_directory(path: Path, option: str) -> None:
    """Raises `errors.ConfigError` unless `path` is a directory."""
    if not path.is_dir():
        raise errors.ConfigError(f"{option} {path} is no directory: create it or correct the path")
