"""The containers of a node pod as a runtime starts them from the manifest: runc, a cgroup namespace of their own,
capabilities and mounts as declared, everything else away.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from capture.harness import BPFFS, mount_bpffs, remove_cgroups
from capture.remote import RemoteProcess
from capture.topology import Network
from manifests import LAUNCHERS, Object, container, node_pod, uninstaller

from undermesh.agent import cgroups
from undermesh.lab.build import Build

T = TypeVar("T")

NODE = "node-1"
BUILD = Build.of_this_package().root
UID = "0a1b2c3d-1111-2222-3333-444455556666"
POD_SLICE = f"kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice"
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
# A machine that is busy with other tests takes seconds to start a Python in a container.
_PATIENCE_S = 40.0
# Holds the node's cgroup namespace and mounts. It leaves the root at once: where a runtime has given controllers to
# the cgroups below, no process may be in there any more.
_INIT = """
set -eu
echo $$ > {root}/cgroup.procs
exec unshare --cgroup --mount --propagation private sh -euc '
    mount -t cgroup2 none /sys/fs/cgroup
    echo $$ > /sys/fs/cgroup/system/cgroup.procs
    echo ready
    exec sleep infinity >&-'
"""
_ENTER = 'echo $$ > "$1"/system/cgroup.procs && shift && exec "$@"'

_UNASKED = """
import sys
from undermesh.agent import __main__, features
features._CAPABILITIES.clear()
sys.exit(__main__.main())
"""


class Pod:
    """An app's pod: a namespace and one process in it."""

    def __init__(self, node: Node) -> None:
        self.netns, self.addresses = node.network.plug(False, "eth0", True)
        self.uid = str(uuid.uuid4())
        cgroup = node.root / f"kubepods.slice/kubepods-pod{self.uid.replace('-', '_')}.slice"
        cgroup.mkdir()
        self.process = RemoteProcess(self.netns.path, cgroup)


class Node:
    """A subtree of cgroup2, a network namespace, and pods."""

    def __init__(self) -> None:
        mount_bpffs()
        self.name = f"um-test-{uuid.uuid4().hex[:8]}"
        self.root = cgroups.find_mount() / self.name
        self.pins = BPFFS / self.name
        self.pods: list[Pod] = []
        for group in (self.root, self.root / "system", self.root / "kubepods.slice", self.root / POD_SLICE):
            group.mkdir()
        self.network = Network()
        self._init = subprocess.Popen(
            ["sh", "-c", _INIT.format(root=self.root)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert self._init.stdout is not None
        with self._init.stdout as said:
            assert said.read() == b"ready\n", "the node has no cgroup namespace"

    def inside(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` on the node: elsewhere it would take the machine for the node."""
        enter = ["nsenter", f"--target={self._init.pid}", "--cgroup", "--mount", "--", *argv]
        return ["sh", "-c", _ENTER, "sh", str(self.root), *enter]

    def pod(self) -> Pod:
        self.pods.append(Pod(self))
        return self.pods[-1]

    def close(self) -> None:
        for pod in self.pods:
            pod.process.end()
            pod.netns.close()
        self.network.close()
        self._init.kill()
        self._init.wait()
        remove_cgroups(self.root)


class Containers:
    """Starts and ends the containers of one node pod on `node`."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.node = node
        self.directory = directory
        self.run_dir = directory / "run/undermesh"
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("run/undermesh", "var/lib/undermesh", "opt/cni/bin", "etc/cni/net.d", "secrets", "objects"):
            (directory / name).mkdir(parents=True)
        (directory / "etc/cni/net.d/10-lab.conflist").write_text(
            '{"cniVersion": "1.0.0", "name": "lab", "plugins": [{"type": "ptp"}]}'
        )
        self._host = {
            "/run/undermesh": directory / "run/undermesh",
            "/var/lib/undermesh": directory / "var/lib/undermesh",
            "/opt/cni/bin": directory / "opt/cni/bin",
            "/etc/cni/net.d": directory / "etc/cni/net.d",
        }

    def start(
        self, name: str, *, args: Sequence[str] = (), command: Sequence[str] = (), without: str = "", **env: str
    ) -> None:
        """Start one container of the manifest, perhaps with another command and without one of its capabilities."""
        declared = uninstaller() if name == "uninstall" else container(node_pod(), name)
        bundle = self.directory / name
        shutil.rmtree(bundle, ignore_errors=True)
        _make_root(bundle / "rootfs")
        spec = self._spec(declared, [*(command or _entry_point(declared)), *args], env, without)
        (bundle / "config.json").write_text(json.dumps(spec))
        runc = ["runc", "--root", str(self.directory / "runc"), "run", "--bundle", str(bundle), self._id(name)]
        with self.log(name).open("ab") as log:
            self.started[name] = subprocess.Popen(
                self.node.inside(runc), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def start_agent(self, without: str = "") -> None:
        """With files in place of the API server, and no control plane.

        Without a capability it also goes without asking for it at its start: what counts is what then fails.
        """
        args = [f"--node={NODE}", f"--source=files:{self.directory / 'objects'}", "--cgroup-root=/host/sys/fs/cgroup"]
        args += ["--control-plane=127.0.0.1:1", "--ca-root=/var/run/secrets/root.pem", "--token=/var/run/secrets/token"]
        command = ["python3", "-c", _UNASKED, "--bpf-dir=/opt/undermesh/bpf"] if without else []
        env = {"PYTHONPATH": "/opt/undermesh/python:/opt/undermesh/site-packages"} if without else {}
        self.start("agent", args=[*args, f"--pin-dir={self.node.pins}"], command=command, without=without, **env)

    def start_ztunnel(self) -> None:
        self.start("ztunnel", NODE_ADDRESS="127.0.0.1")

    def stop(self, name: str) -> None:
        """End a container and wait for it."""
        process = self.started.pop(name)
        with contextlib.suppress(FileNotFoundError):
            (self.scope(name) / "cgroup.kill").write_text("1")
        process.wait(_PATIENCE_S)
        runc = ["runc", "--root", str(self.directory / "runc"), "delete", "--force", self._id(name)]
        subprocess.run(self.node.inside(runc), capture_output=True, timeout=30, check=False)

    def close(self) -> None:
        for name in list(self.started):
            self.stop(name)

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def scope(self, name: str) -> Path:
        """The container's cgroup."""
        return self.node.root / POD_SLICE / f"cri-containerd-{self._id(name)}.scope"

    def processes(self, name: str) -> list[int]:
        return cgroups.processes(self.scope(name))

    def ask(self, path: str) -> Any:
        """What the agent answers; None: it does not."""
        connection = http.client.HTTPConnection("agent")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(5)
            try:
                sock.connect(str(self.run_dir / "agent.sock"))
                connection.sock = sock
                connection.request("GET", path)
                return json.loads(connection.getresponse().read())
            except (OSError, http.client.HTTPException):
                return None

    def label(self, *pods: Pod, enrolled: bool = True) -> None:
        """Write the objects of the pods, and their namespace."""
        mesh = "enabled" if enrolled else "disabled"
        written = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "uid": "u-shop"}}]
        written += [
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"p-{pod.uid[:8]}",
                    "namespace": "shop",
                    "uid": pod.uid,
                    "labels": {"undermesh.io/mesh": mesh},
                },
                "spec": {"nodeName": NODE, "serviceAccountName": "web", "containers": [{"name": "app"}]},
                "status": {"phase": "Running", "podIPs": [{"ip": ip} for ip in pod.addresses.values()]},
            }
            for pod in pods
        ]
        path = self.directory / "objects/all.yaml"
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": written}))
        new.rename(path)

    def wait(self, what: str, condition: Callable[[], T]) -> T:
        """Wait for something true, and return it; the logs explain a failure."""
        deadline = time.monotonic() + _PATIENCE_S
        while not (value := condition()):
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-3000:] for path in self.directory.glob("*.log"))
                raise AssertionError(f"within {_PATIENCE_S:.0f} s it never came true: {what}\n{logs}")
            time.sleep(0.05)
        return value

    def _id(self, name: str) -> str:
        return f"{self.node.name}-{name}"

    def _spec(self, declared: Object, args: list[str], env: dict[str, str], without: str) -> Object:
        security = declared["securityContext"]
        held = [f"CAP_{name}" for name in security["capabilities"].get("add", ()) if name != without]
        env = {"PATH": f"/opt/undermesh/bin:{Path(sys.base_prefix, 'bin')}:/usr/sbin:/usr/bin", **env}
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": security["runAsUser"], "gid": 0},
                "args": args,
                "env": [f"{key}={value}" for key, value in env.items()],
                "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), held),
                "noNewPrivileges": not security["allowPrivilegeEscalation"],
            },
            "root": {"path": "rootfs", "readonly": security["readOnlyRootFilesystem"]},
            "mounts": [*self._mounts(declared), *_image_mounts()],
            "linux": {
                "cgroupsPath": f"/{POD_SLICE}/{self.scope(declared['name']).name}",
                # hostPID and hostNetwork: the machine's processes, the node's network.
                "namespaces": [
                    {"type": "mount"},
                    {"type": "ipc"},
                    {"type": "cgroup"},
                    {"type": "network", "path": self.node.network.node.path},
                ],
                "readonlyPaths": _READ_ONLY,
                "rootfsPropagation": "rslave",
            },
        }

    def _mounts(self, declared: Object) -> list[Object]:
        """As containerd: its own ones first, then those of the manifest that the test's node has."""
        found = [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "ro"]},
            _bind(self.directory / "objects", str(self.directory / "objects"), read_only=True),
        ]
        paths = {v["name"]: v["hostPath"]["path"] for v in node_pod()["volumes"] if "hostPath" in v}
        empty = {v["name"] for v in node_pod()["volumes"] if "emptyDir" in v}
        for mount in declared["volumeMounts"]:
            if mount["name"] in empty:
                found.append({"destination": mount["mountPath"], "type": "tmpfs", "source": "tmpfs", "options": []})
            if mount["name"] in paths:
                path = paths[mount["name"]]
                source = self._host.get(path, Path(path))
                found.append(_bind(source, mount["mountPath"], read_only=mount.get("readOnly", False)))
        return found


def _entry_point(declared: Object) -> list[str]:
    return declared.get("command") or [f"/opt/undermesh/bin/undermesh-{declared['name']}"]


def _image_mounts() -> list[Object]:
    home = "/opt/undermesh"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = [path for path in (BUILD / "py/undermesh").iterdir() if path.is_dir()]
    binds = [
        *((path.resolve(), f"{home}/python/undermesh/{path.name}") for path in packages),
        (BUILD / f"venv/lib/{version}/site-packages", f"{home}/site-packages"),
        (BUILD / "bpf", f"{home}/bpf"),
        *((BUILD / "rust/fast" / name, f"{home}/bin/{name}") for name in ("ztunnel", "undermesh-cni")),
        *((path, f"{home}/bin/{path.name}") for path in LAUNCHERS.iterdir()),
        (Path("/usr"), "/usr"),
    ]
    base = Path(sys.base_prefix)
    if not base.is_relative_to("/usr"):
        binds.append((base, str(base)))
    return [_bind(source, target, read_only=True) for source, target in binds]


def _bind(source: Path, target: str, *, read_only: bool) -> Object:
    options = ["rbind", "rslave", "ro" if read_only else "rw"]
    return {"destination": target, "type": "bind", "source": str(source), "options": options}


def _make_root(root: Path) -> None:
    for name in ("dev", "etc", "opt", "proc", "run", "sys", "tmp", "usr", "var"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    shutil.copy("/etc/ld.so.cache", root / "etc")


@contextlib.contextmanager
def containers() -> Iterator[Containers]:
    """A node with containers; everything is gone afterwards."""
    node = Node()
    with tempfile.TemporaryDirectory(prefix=node.name, dir="/run") as directory:
        made = Containers(node, Path(directory))
        try:
            yield made
        finally:
            made.close()
            uninstall = [sys.executable, "-m", "undermesh.agent.uninstall", "--force", "--pin-dir", str(node.pins)]
            subprocess.run(uninstall, capture_output=True, check=True, env=os.environ)
            node.close()
