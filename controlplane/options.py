"""The control plane's command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from undermesh.api.source_option import HELP, source_option
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
    parser.add_argument("--source", type=source_option, required=True, metavar="SOURCE", help=HELP)
    parser.add_argument("--state", type=Path, metavar="DIR", help="keys and node reports; only for a source of files")
    parser.add_argument("--namespace", default="undermesh-system", metavar="NAME", help="of our Secrets and Lease")
    parser.add_argument("--listen", type=address, required=True, metavar="IP:PORT", help="gRPC with TLS")
    parser.add_argument("--metrics", type=address, metavar="IP:PORT", help="Prometheus metrics over HTTP")
    parser.add_argument("--token-review", action="store_true", help="ask the API server whose a token is")
    parser.add_argument("--token-jwks", type=Path, metavar="FILE", help="keys of agents' tokens")
    parser.add_argument("--token-issuer", metavar="ISS", help="issuer of agents' tokens")
    parser.add_argument("--trust-domain", default="cluster.local", metavar="NAME")
    parser.add_argument("--cluster", default="Kubernetes", metavar="NAME", help="cluster id in workload uids")
    parser.add_argument(
        "--root-namespace", default="undermesh-system", metavar="NAME", help="its policies hold for all namespaces"
    )
    parser.add_argument("--root-bundle-out", type=Path, metavar="FILE", help="write the trusted roots here")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    found = parser.parse_args(arguments)
    if complaint := _token_complaint(found) or _state_complaint(found):
        parser.error(complaint)
    return found


def _token_complaint(found: argparse.Namespace) -> str:
    """What is wrong with the choice of who judges tokens; empty: nothing."""
    if found.token_review:
        if found.source.kind != "kubernetes":
            return "--token-review needs --source kubernetes"
        if found.token_jwks or found.token_issuer:
            return "--token-review and --token-jwks exclude each other"
        return ""
    if found.token_jwks is None or not found.token_issuer:
        return "--token-jwks and --token-issuer are required, or --token-review"
    return ""


def _state_complaint(found: argparse.Namespace) -> str:
    """What is wrong with where state is kept; empty: nothing."""
    if found.source.kind == "files" and found.state is None:
        return "--state is required with a source of files"
    if found.source.kind == "kubernetes" and found.state is not None:
        return "--state is for a source of files: with --source kubernetes the API server keeps everything"
    return ""


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
