"""What stands in for container images: nothing is pulled, a root is put together from the machine.

A root is an overlay: the image's own files, below them a base with a minimal /etc; /usr is a second overlay
over the machine's /usr. The writable layer of both is the container's, so writes work as in any container and
end with it. `TABLE` says what each known name adds. Layout of the product's images: daemonset/images/README.md.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from undermesh.lab.commands import run
from undermesh.lab.runtime.oci import ImageConfig
from undermesh.lab.runtime.types import ContainerConfig, Mount, RuntimeFault

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BUSYBOX = "/usr/lib/busybox-applets"
_HOME = "/opt/undermesh"
_COPIED = [
    "alternatives",
    "bash.bashrc",
    "ca-certificates.conf",
    "debian_version",
    "iproute2",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "mime.types",
    "os-release",
    "profile",
    "protocols",
    "services",
    "ssl",
    "timezone",
]
_PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
_GROUP = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"
_LAUNCHERS = ("undermesh", "undermesh-agent", "undermesh-uninstall", "undermesh-controlplane", "undermesh-ztunnel")


@dataclass(frozen=True)
class Image:
    """A stand-in for one image."""

    entry_point: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    user: int = 0
    product: bool = False
    """Has the product at /opt/undermesh."""
    python: bool = False
    """Has the Python that the lab runs on, as python3."""
    env: tuple[tuple[str, str], ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """Path below the root -> text."""


def _page(title: str) -> str:
    return f"<!DOCTYPE html>\n<html>\n<head><title>{title}</title></head>\n<body><h1>{title}</h1></body>\n</html>\n"


def _lab(*command: str, **more: tuple[str, ...] | Mapping[str, str]) -> Image:
    pythonpath = (("PYTHONPATH", f"{_HOME}/python:{_HOME}/site-packages"), ("PYTHONDONTWRITEBYTECODE", "1"))
    return Image(entry_point=command, product=True, python=True, env=pythonpath, **more)  # type: ignore[arg-type]


def _web(root: str, title: str) -> Image:
    return _lab(
        *("python3", "-S", "-m", "undermesh.lab.runtime.stand_in", "--port", "80", "--directory", root),
        files={f"{root}/index.html": _page(title)},
    )


TABLE: Mapping[str, Image] = {
    "undermesh/agent": Image((f"{_HOME}/bin/undermesh-agent",), product=True, python=True),
    "undermesh/ztunnel": Image((f"{_HOME}/bin/undermesh-ztunnel",), product=True),
    "undermesh/controlplane": Image((f"{_HOME}/bin/undermesh-controlplane",), user=65532, product=True, python=True),
    "undermesh/lab": _lab("python3"),
    "busybox": Image(args=("sh",)),
    "alpine": Image(args=("/bin/sh",)),
    "debian": Image(args=("bash",)),
    "ubuntu": Image(args=("/bin/bash",)),
    "bash": Image(args=("bash",)),
    "python": Image(args=("python3",), python=True),
    "curl": Image(entry_point=("curl",)),
    "netshoot": Image(args=("bash",)),
    "pause": Image(entry_point=("sleep", "infinity")),
    "nginx": _web("/usr/share/nginx/html", "Welcome to nginx!"),
    "httpd": _web("/usr/local/apache2/htdocs", "It works!"),
    "http-echo": _lab("python3", "-S", "-m", "undermesh.lab.runtime.stand_in", "--port", "5678", "--echo"),
}
"""By the last one or two parts of an image's name; registry, tag and digest do not count."""


def names() -> list[str]:
    """The images that are there, as a node's status names them."""
    return sorted(f"docker.io/{name if '/' in name else f'library/{name}'}:latest" for name in TABLE)


def lookup(reference: str) -> Image | None:
    """The stand-in for an image, None if its name says nothing to the lab."""
    repository = re.sub(r"@.*$|:[^/:]*$", "", reference)
    parts = repository.split("/")
    return TABLE.get("/".join(parts[-2:])) or TABLE.get(parts[-1])


def image_id(reference: str) -> str:
    """As containerd shows one; the same for the same reference on every node."""
    return f"sha256:{hashlib.sha256(reference.encode()).hexdigest()}"


class Images:
    """Roots on one node.

    Args:
        build: the build directory, whose parent has the sources of the launchers.
        directory: where the images' files are put, on a file system that can be part of an overlay.
    """

    def __init__(self, build: Path, directory: Path) -> None:
        self._build = build
        self._directory = directory
        self._making = threading.Lock()

    def resolve(self, config: ContainerConfig) -> ImageConfig:
        """What the container's image says.

        Raises:
            RuntimeFault: ErrImagePull: an unknown name, and no command that would run all the same.
        """
        image = lookup(config.image)
        if image is None and not config.command:
            known = ", ".join(sorted(TABLE))
            raise RuntimeFault(
                "ErrImagePull",
                f'failed to pull image "{config.image}": this lab pulls nothing and has no stand-in of that name; '
                f"give the container a command, which runs with the machine's own programs, or use one of {known}",
            )
        image = image or Image()
        return ImageConfig(
            entry_point=image.entry_point,
            args=image.args,
            env=(("PATH", self._path(image)), *image.env),
            user=image.user,
            mounts=tuple(self._mounts(image)),
        )

    def layers(self, reference: str) -> tuple[list[Path], list[Path]]:
        """The read-only layers of / and of /usr, uppermost first; put together when first asked for."""
        base = self._once("base", self._make_base)
        image = lookup(reference)
        if image is None or not image.files:
            return [base], [base / "usr", Path("/usr")]
        own = self._once(re.sub(r"\W", "-", image_id(str(sorted(image.files)))), lambda root: _write(root, image.files))
        return [own, base], [own / "usr", base / "usr", Path("/usr")]

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        root = self._directory / name
        with self._making:
            if not root.exists():
                new = self._directory / f"{name}.new"
                shutil.rmtree(new, ignore_errors=True)
                (new / "usr").mkdir(parents=True)
                make(new)
                new.rename(root)
        return root

    def _path(self, image: Image) -> str:
        first = [f"{_HOME}/bin"] if image.product else []
        if image.python and not _within(_python(), Path("/usr")):
            first.append(str(_python() / "bin"))
        return ":".join((*first, PATH, _BUSYBOX))

    def _mounts(self, image: Image) -> list[Mount]:
        found = []
        if image.python and not _within(_python(), Path("/usr")):
            found.append(_read_only(_python(), str(_python())))
        if image.product:
            found += self._product()
        return [mount for mount in found if Path(mount.source).exists()]

    def _product(self) -> list[Mount]:
        build = self._build.resolve()
        launchers = build.parent / "daemonset/images/bin"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = sorted(path for path in (build / "py/undermesh").iterdir() if path.is_dir())
        return [
            *(_read_only(path.resolve(), f"{_HOME}/python/undermesh/{path.name}") for path in packages),
            _read_only(build / f"venv/lib/{version}/site-packages", f"{_HOME}/site-packages"),
            _read_only(build / "bpf", f"{_HOME}/bpf"),
            *(_read_only(build / "rust/fast" / name, f"{_HOME}/bin/{name}") for name in ("ztunnel", "undermesh-cni")),
            *(_read_only(launchers / name, f"{_HOME}/bin/{name}") for name in _LAUNCHERS),
        ]

    def _make_base(self, root: Path) -> None:
        for name in [
            "dev",
            "etc",
            "home",
            "media",
            "mnt",
            "opt",
            "proc",
            "root",
            "run",
            "srv",
            "sys",
            "tmp",
            "var",
            "var/cache",
            "var/lib",
            "var/log",
            "var/tmp",
        ]:
            (root / name).mkdir()
        for name, mode in (("tmp", 0o1777), ("var/tmp", 0o1777), ("root", 0o711)):
            (root / name).chmod(mode)
        (root / "var/run").symlink_to("/run")
        for name in ("bin", "sbin", "lib", "lib32", "lib64"):
            if Path("/usr", name).is_dir():
                (root / name).symlink_to(f"usr/{name}")
        _write(root, {"/etc/passwd": _PASSWD, "/etc/group": _GROUP, "/etc/nsswitch.conf": "hosts: files dns\n"})
        for name in _COPIED:
            _copy(Path("/etc", name), root / "etc" / name)
        _busybox_applets(root / _BUSYBOX.lstrip("/"))


def _python() -> Path:
    """Where the interpreter that runs the lab has its libraries."""
    return Path(sys.base_prefix).resolve()


def _within(path: Path, parent: Path) -> bool:
    return path == parent or parent in path.parents


def _read_only(source: Path, target: str) -> Mount:
    return Mount(str(source), target, read_only=True)


def _write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _copy(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_dir():
        # Keys are for root's eyes only, and so none of a container's business.
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("private"))
    elif source.exists():
        shutil.copy(source, target)


def _busybox_applets(directory: Path) -> None:
    """Names for what the machine has not got as a program of its own: last in PATH."""
    busybox = shutil.which("busybox", path="/usr/bin:/bin")
    if busybox is None:
        return
    directory.mkdir(parents=True)
    for applet in run([busybox, "--list"]).split():
        (directory / applet).symlink_to(busybox)
