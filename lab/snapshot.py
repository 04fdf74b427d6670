"""What a machine and a netns look like, so that "removed without a trace" can be observed.

A snapshot is a set of lines, each with its category; `differences` says in words what was added or went.
Whatever changes by itself (counters, lifetimes) is left out, and so is what only other programs make.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from undermesh.lab import cgroups, netns, processes
from undermesh.lab.bpffs import BPFFS, PRELOADED
from undermesh.lab.commands import run

Snapshot = Counter[tuple[str, str]]
"""(category, line), counted: two equal rules are not one."""

_IP_VIEWS = {
    "link": ["link", "show"],
    "address": ["address", "show"],
    "rule (IPv4)": ["-4", "rule", "show"],
    "rule (IPv6)": ["-6", "rule", "show"],
    "route (IPv4)": ["-4", "route", "show", "table", "all"],
    "route (IPv6)": ["-6", "route", "show", "table", "all"],
}
_CHANGING_WORDS = re.compile(r"\\|\b(valid_lft|preferred_lft|expires) \S+")
_CHANGING_SYSCTLS = re.compile(r"net/netfilter/nf_conntrack_count$|/stable_secret$|/route/flush$|/tcp_fastopen_key$")
# Mounts of other kinds are none that the lab or the agent could have made.
_MOUNT_KINDS = {"bpf", "nsfs", "cgroup2"}
_FDINFO = re.compile(r"^(prog|map|link)_id:\s+(\d+)$", re.MULTILINE)


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """What was added and what went, a line each; empty if nothing differs."""
    added = [f"left over: {kind}: {line}" for kind, line in sorted((after - before).elements())]
    gone = [f"missing: {kind}: {line}" for kind, line in sorted((before - after).elements())]
    return added + gone


def take_netns(name: str) -> Snapshot:
    """A netns of the lab: links, addresses, rules, routes, packet filter, sysctls and sk_lookup programs."""
    seen: Snapshot = Counter()
    seen.update(_ip_views(netns.enter(name, ["ip"])))
    seen.update(("nftables", line) for line in _nft(netns.enter(name, ["nft", "list", "ruleset"])))
    seen.update(netns.call(name, lambda: list(_sysctls())))
    inode = netns.path(name).stat().st_ino
    for link in json.loads(run(["bpftool", "-j", "link", "show"])):
        if link.get("netns_ino") == inode:
            seen["BPF link", f"{link['type']} {link.get('attach_type', '')}"] += 1
    return seen


def take_host(prefix: str) -> Snapshot:
    """The machine: this process's netns as above, mounts, pins, run files.

    Of processes, cgroups and namespaces only those of the lab `prefix` are taken: others come and go. So do
    BPF objects; bpf_objects and bpf_left_over follow the lab's own.
    """
    seen: Snapshot = Counter()
    seen.update(_ip_views(["ip"]))
    seen.update(("nftables", line) for line in _nft(["nft", "list", "ruleset"]))
    seen.update(_sysctls())
    seen.update(("mount", line) for line in _mounts(prefix))
    seen.update(("pin", line) for line in _pins(prefix))
    seen.update(("netns", path.name) for path in _below(netns.NETNS_DIR) if path.name.startswith(prefix))
    seen.update(("process", line) for line in _processes(prefix))
    seen.update(("file", str(path)) for path in _below(Path("/run")) if path.name.startswith(prefix))
    root = cgroups.mount_point() / prefix
    if root.exists():
        seen.update(("cgroup", str(path)) for path in [root, *root.rglob("*/")])
    return seen


def _ip_views(ip: list[str]) -> Iterator[tuple[str, str]]:
    for category, view in _IP_VIEWS.items():
        for line in run([*ip, "-o", *view]).splitlines():
            yield category, " ".join(_CHANGING_WORDS.sub("", line).split())


def _nft(argv: list[str]) -> Iterator[str]:
    for line in run(argv).splitlines():
        if line.strip():
            yield re.sub(r"counter packets \d+ bytes \d+", "counter", line.strip())


def _sysctls() -> Iterator[tuple[str, str]]:
    """net.* of the netns of the calling thread."""
    for directory, _, files in os.walk("/proc/sys/net"):
        for name in files:
            path = Path(directory, name)
            key = str(path.relative_to("/proc/sys"))
            if _CHANGING_SYSCTLS.search(key):
                continue
            try:
                value = path.read_text(errors="replace")
            except OSError:
                # Write-only ones, and those of a device that went while we walked: no value to compare.
                continue
            yield "sysctl", f"{key} = {' '.join(value.split())}"


def _mounts(prefix: str) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, source = line.partition(" - ")
        target, kind = fields.split()[4], source.split()[0]
        # Namespaces of other labs come and go, and with the last of them the mount that holds them.
        other = kind == "nsfs" and not Path(target).name.startswith(prefix)
        other |= target == str(netns.NETNS_DIR) and _holds_other_labs(prefix)
        if not other and (kind in _MOUNT_KINDS or target == str(netns.NETNS_DIR) or f"/{prefix}" in target):
            yield f"{target} ({kind})"


def _holds_other_labs(prefix: str) -> bool:
    return any(path.name.startswith("um-") and not path.name.startswith(prefix) for path in _below(netns.NETNS_DIR))


def _pins(prefix: str) -> Iterator[str]:
    for top in _below(BPFFS):
        if top.name in PRELOADED or (top.name.startswith("um-") and not top.name.startswith(prefix)):
            continue
        yield str(top)
        if top.is_dir():
            yield from (str(path) for path in top.rglob("*"))


def bpf_objects(prefix: str, nodes: Sequence[Sequence[str]] = ()) -> dict[tuple[str, int], str]:
    """The BPF objects that the lab `prefix` has pinned or holds open: (kind, id) -> name, to look for later.

    Args:
        nodes: for each node with a bpffs of its own, the command line that enters it.
    """
    held = set(_held_bpf_objects(prefix))
    views = [(_all_bpf_objects(), f"{BPFFS}/{prefix}-"), *((_all_bpf_objects(enter), f"{BPFFS}/") for enter in nodes)]
    return {
        key: name
        for objects, pins in views
        for key, (name, paths) in objects.items()
        if key in held or any(path.startswith(pins) for path in paths)
    }


def bpf_left_over(known: Mapping[tuple[str, int], str]) -> list[str]:
    """Which of the objects that `bpf_objects` saw are there still, as `differences` would say it."""
    there = _all_bpf_objects()
    return [
        f"left over: BPF {kind}: id {number} {known[kind, number]}" for kind, number in known if (kind, number) in there
    ]


def _all_bpf_objects(enter: Sequence[str] = ()) -> dict[tuple[str, int], tuple[str, list[str]]]:
    """(kind, id) -> (name, paths of its pins), as seen behind the command line `enter`."""
    return {
        (kind, item["id"]): (f"{item.get('type', '')} {item.get('name', '')}".strip(), item.get("pinned", []))
        for kind in ("prog", "map", "link")
        for item in json.loads(run([*enter, "bpftool", "-j", "-f", kind, "show"]))
    }


def _held_bpf_objects(prefix: str) -> Iterator[tuple[str, int]]:
    """Those that processes of the lab have open, by what /proc says of their FDs."""
    for process in {*_marked(prefix), *_in_cgroup(prefix)}:
        for info in (process / "fdinfo").glob("*"):
            try:
                text = info.read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            yield from ((kind, int(number)) for kind, number in _FDINFO.findall(text))


def _processes(prefix: str) -> Iterator[str]:
    for process in _marked(prefix):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield f"pid {process.name}: {command.strip()}"


def _in_cgroup(prefix: str) -> Iterator[Path]:
    """The /proc directories of the processes in the lab's cgroups."""
    root = cgroups.mount_point() / prefix
    for group in [root, *root.rglob("*/")] if root.exists() else ():
        yield from (Path("/proc", str(pid)) for pid in cgroups.processes(group))


def _marked(prefix: str) -> Iterator[Path]:
    """The /proc directories of the lab's processes."""
    mark = f"{processes.MARK}={prefix}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes().split(b"\0"):
                yield path
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            # Gone meanwhile, or closed even to root, as pid 1 of a container is: none of ours.
            continue


def _below(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.exists() else []
