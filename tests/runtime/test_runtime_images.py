"""Which stand-in an image's name means, and what it brings."""

from __future__ import annotations

from pathlib import Path

import pytest

from undermesh.lab.runtime.images import TABLE, Images, image_id, lookup
from undermesh.lab.runtime.types import ContainerConfig, RuntimeFault

BUILD = Path(__file__).resolve().parents[2] / "build"


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("nginx", "nginx"),
        ("nginx:1.27-alpine", "nginx"),
        ("docker.io/library/nginx@sha256:" + "0" * 64, "nginx"),
        ("localhost:5000/busybox", "busybox"),
        ("localhost:5000/undermesh/agent:dev", "undermesh/agent"),
        ("curlimages/curl:8.1", "curl"),
        ("nicolaka/netshoot", "netshoot"),
    ],
)
def test_registry_tag_and_digest_do_not_count(reference: str, name: str) -> None:
    assert lookup(reference) is TABLE[name]


@pytest.mark.parametrize("reference", ["example.org/agent", "nginx-exporter", "agent/undermesh"])
def test_other_names_mean_nothing(reference: str) -> None:
    assert lookup(reference) is None


def test_an_image_that_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeFault, match=r'"redis:7": this lab pulls nothing.*give the container a command'
    ) as caught:
        Images(BUILD, tmp_path).resolve(ContainerConfig("app", 0, "redis:7", args=("--flag",)))
    assert caught.value.reason == "ErrImagePull"


def test_the_products_mounts_are_read_only_and_as_the_images_readme_has_them(tmp_path: Path) -> None:
    found = Images(BUILD, tmp_path).resolve(ContainerConfig("app", 0, "undermesh/agent:dev"))
    targets = {mount.target for mount in found.mounts}
    assert all(mount.read_only for mount in found.mounts)
    assert {f"/opt/undermesh/{name}" for name in ("bin/undermesh-cni", "bpf", "python/undermesh/agent")} <= targets
    assert found.entry_point == ("/opt/undermesh/bin/undermesh-agent",)
    assert dict(found.env)["PATH"].startswith("/opt/undermesh/bin:")


def test_every_entry_point_of_the_product_exists() -> None:
    launchers = Path(__file__).resolve().parents[2] / "daemonset/images/bin"
    for name, image in TABLE.items():
        if image.product and image.entry_point[0].startswith("/opt/undermesh/bin/"):
            assert (launchers / Path(image.entry_point[0]).name).is_file(), name


def test_a_roots_files_are_the_images_above_a_base_without_the_machines(tmp_path: Path) -> None:
    root, usr = Images(BUILD, tmp_path).layers("httpd:2.4")
    assert "It works!" in (root[0] / "usr/local/apache2/htdocs/index.html").read_text()
    base = root[-1]
    assert (base / "etc/passwd").read_text().startswith("root:x:0:0") and not (base / "etc/shadow").exists()
    assert not list((base / "root").iterdir()) and not (base / "etc/ssl/private").exists()
    assert usr[-1] == Path("/usr") and (base / "tmp").stat().st_mode & 0o7777 == 0o1777


def test_an_image_id_is_the_references(tmp_path: Path) -> None:
    assert image_id("a") == image_id("a") != image_id("b") and image_id("a").startswith("sha256:")
