"""The plugin on a node's disk: installed, kept there whatever others do, and gone without a trace."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_bench import until

from undermesh.agent import cni_conflist, cni_files
from undermesh.agent.cni_files import CniFiles
from undermesh.agent.cni_install import CniInstaller
from undermesh.lab.build import Build

REAL = Build.of_this_package().ztunnel.with_name("undermesh-cni")
LIST = b'{"cniVersion":"1.0.0","name":"lab",\n "plugins":[{"type":"ptp","mtu":1500}]}'
OTHER = b'{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"bridge"},{"type":"portmap"}]}'
PLAIN = b'{"cniVersion":"0.4.0","name":"old","type":"macvlan","master":"eth1"}'


class Disk:
    """A node's CNI directories and its agent's hands on them."""

    def __init__(self, root: Path) -> None:
        self.conf = root / "net.d"
        self.bin = root / "bin"
        self.conf.mkdir()
        self.bin.mkdir()
        self.files = self.agent(REAL)

    def agent(self, source: Path) -> CniFiles:
        entry = cni_conflist.entry("/run/undermesh/cni.sock", "/var/lib/undermesh/enrolled-namespaces")
        return CniFiles(source, self.bin, self.conf, entry)

    def write(self, **files: bytes) -> None:
        for name, content in files.items():
            (self.conf / name.replace("_", ".")).write_bytes(content)

    def types(self, name: str) -> list[str]:
        return [plugin["type"] for plugin in json.loads((self.conf / name).read_bytes())["plugins"]]

    def everything(self) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for d in (self.conf, self.bin) for p in sorted(d.iterdir())}


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


CHOICES: dict[str, tuple[dict[str, bytes], str | None]] = {
    "none": ({}, None),
    "the first of several": ({"a_conflist": LIST, "b_conflist": OTHER}, "a.conflist"),
    "the first that is valid": ({"a_conflist": b"{", "b_conflist": OTHER}, "b.conflist"),
    "no other extension": ({"a_conflist_bak": LIST, "b_conflist": OTHER}, "b.conflist"),
    "one plugin alone": ({"a_conf": PLAIN}, "a-undermesh.conflist"),
    "one plugin as .json": ({"a_json": PLAIN, "b_conflist": LIST}, "a-undermesh.conflist"),
    "a list before one plugin": ({"a_conflist": LIST, "b_conf": PLAIN}, "a.conflist"),
    "nothing valid": ({"a_conf": b"{}", "b_conflist": b"[]"}, None),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_configuration_that_the_runtime_takes_gets_the_plugin(disk: Disk, name: str) -> None:
    files, expected = CHOICES[name]
    disk.write(**files)
    found, changed = disk.files.ensure_configured()
    assert (found.name if found else None) == expected and bool(changed) == bool(expected)
    if expected is not None:
        runtime_takes = next(n for n in sorted(os.listdir(disk.conf)) if n >= expected and not n.startswith("."))
        assert runtime_takes == expected and disk.types(expected)[-1] == "undermesh-cni"
    assert disk.files.ensure_configured() == (found, [])
    assert len(disk.files.skipped) == sum(content in (b"{", b"{}", b"[]") for content in files.values())


@pytest.mark.parametrize("name", CHOICES)
def test_removal_restores_every_byte(disk: Disk, name: str) -> None:
    disk.write(**CHOICES[name][0])
    for path in disk.conf.iterdir():
        path.chmod(0o640)
    before = disk.everything()
    disk.files.ensure_plugin()
    disk.files.ensure_configured()
    cni_files.remove(disk.bin, disk.conf)
    assert disk.everything() == before
    assert {path.stat().st_mode & 0o777 for path in disk.conf.iterdir()} <= {0o640}


def test_removal_keeps_what_others_changed_since(disk: Disk) -> None:
    disk.write(a_conflist=LIST)
    disk.files.ensure_configured()
    changed = json.loads((disk.conf / "a.conflist").read_bytes())
    changed["plugins"].append({"type": "tuning"})
    disk.write(a_conflist=json.dumps(changed).encode())
    assert disk.files.ensure_configured()[1] == []
    cni_files.remove(disk.bin, disk.conf)
    assert disk.types("a.conflist") == ["ptp", "tuning"] and os.listdir(disk.conf) == ["a.conflist"]


def test_a_second_rewrite_by_its_owner_is_what_removal_restores(disk: Disk) -> None:
    disk.write(a_conflist=LIST)
    disk.files.ensure_configured()
    disk.write(a_conflist=OTHER)
    disk.files.ensure_configured()
    cni_files.remove(disk.bin, disk.conf)
    assert (disk.conf / "a.conflist").read_bytes() == OTHER


def test_a_wrapper_follows_its_source_and_goes_with_it(disk: Disk) -> None:
    disk.write(a_conf=PLAIN)
    disk.files.ensure_configured()
    wrapper = disk.conf / "a-undermesh.conflist"
    with_other = json.loads(wrapper.read_bytes())
    with_other["plugins"].append({"type": "istio-cni"})
    wrapper.write_text(json.dumps(with_other))
    assert disk.files.ensure_configured() == (wrapper, []), "others may chain themselves in behind us"
    disk.write(a_conf=PLAIN.replace(b"eth1", b"eth2"))
    assert disk.files.ensure_configured()[1]
    assert json.loads(wrapper.read_bytes())["plugins"][0]["master"] == "eth2"
    (disk.conf / "a.conf").unlink()
    assert disk.files.ensure_configured() == (None, []) and os.listdir(disk.conf) == []


def test_the_plugin_is_installed_whole_and_executable(disk: Disk) -> None:
    assert disk.files.ensure_plugin() == [f"plugin {disk.files.plugin}"]
    assert disk.files.plugin.read_bytes() == REAL.read_bytes() and disk.files.plugin.stat().st_mode & 0o777 == 0o755
    assert os.listdir(disk.bin) == ["undermesh-cni"] and disk.files.ensure_plugin() == []


@pytest.mark.parametrize("damage", ["gone", "overwritten", "not executable"])
def test_a_damaged_plugin_is_replaced(disk: Disk, damage: str) -> None:
    disk.files.ensure_plugin()
    match damage:
        case "gone":
            disk.files.plugin.unlink()
        case "overwritten":
            disk.files.plugin.write_bytes(b"#!/bin/sh\nexit 0\n")
        case _:
            disk.files.plugin.chmod(0o644)
    assert disk.files.ensure_plugin() == [f"plugin {disk.files.plugin}"]
    assert disk.files._answers()


def test_the_agent_that_started_last_decides_on_the_version(disk: Disk, tmp_path: Path) -> None:
    newer_source = tmp_path / "newer"
    newer_source.write_bytes(REAL.read_bytes() + b"\0")  # a build of its own that works as well
    disk.files.ensure_plugin()
    newer = disk.agent(newer_source)
    assert newer.ensure_plugin(), "a new agent replaces what an older one installed"
    assert disk.files.ensure_plugin() == [] and newer.ensure_plugin() == [], "and the older one does not fight it"
    assert disk.files.plugin.read_bytes() == newer_source.read_bytes()


@contextlib.asynccontextmanager
async def installing(files: CniFiles) -> AsyncIterator[CniInstaller]:
    installer = CniInstaller(files)
    task = asyncio.create_task(installer.run())
    try:
        yield installer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_network_that_comes_later_is_joined_at_once(disk: Disk) -> None:
    async with installing(disk.files) as installer:
        await until(lambda: "no network configuration in" in installer.check().detail, "it says what it lacks")
        assert not installer.check().ok and "install a network plugin" in installer.check().next_step
        disk.write(a_conflist=LIST)
        await until(lambda: installer.check().ok, "the plugin is in the list")
        assert disk.types("a.conflist") == ["ptp", "undermesh-cni"]


@pytest.mark.parametrize("turns", range(4))
async def test_an_end_that_meets_a_change_is_an_end(disk: Disk, turns: int) -> None:
    installer = CniInstaller(disk.files)
    task = asyncio.create_task(installer.run())
    await until(lambda: "no network configuration in" in installer.check().detail, "it waits for changes")
    await asyncio.sleep(0.1)
    installer._wake.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=5)
    assert done, "it goes on"


@pytest.mark.parametrize("way", ["written", "renamed", "an earlier file"])
async def test_another_agent_s_rewrite_is_mended_and_logged(
    disk: Disk, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    disk.write(m_conflist=LIST)
    async with installing(disk.files) as installer:
        await until(lambda: installer.check().ok, "the plugin is in the list")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            match way:
                case "written":
                    disk.write(m_conflist=OTHER)
                case "renamed":
                    disk.write(x_tmp=OTHER)
                    (disk.conf / "x.tmp").rename(disk.conf / "m.conflist")
                case _:
                    disk.write(a_conflist=OTHER)
            name = "a.conflist" if way == "an earlier file" else "m.conflist"
            started = asyncio.get_running_loop().time()
            await until(lambda: disk.types(name) == ["bridge", "portmap", "undermesh-cni"], "it is back")
            assert asyncio.get_running_loop().time() - started < 1
            await until(lambda: "CNI: mended undermesh-cni in" in caplog.text, "it is logged")
        await asyncio.sleep(0.3)
        assert caplog.text.count("mended") == 1, "its own change is no reason to write again"


async def test_what_keeps_it_from_installing_is_told(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.write(a_conflist=LIST.replace(b'"1.0.0"', b'"0.2.0"'))
    async with installing(disk.files) as installer:
        await until(lambda: "0.2.0" in installer.check().detail, "the version is named")
        assert not installer.check().ok and "enrolled once they run" in installer.check().next_step
        disk.write(a_conflist=LIST)
        await until(lambda: installer.check().ok, "the plugin is in the list")
    broken = disk.agent(REAL)
    broken.bin_dir = disk.bin / "absent"
    async with installing(broken) as installer:
        await until(lambda: "cannot be installed" in installer.check().detail, "the failure is told")
        assert str(broken.bin_dir) in installer.check().detail and "mounted and writable" in installer.check().next_step


def test_pods_that_were_started_with_the_plugin_can_be_ended_without_it(disk: Disk, tmp_path: Path) -> None:
    disk.write(a_conflist=LIST)
    disk.files.ensure_configured()
    results = tmp_path / "cache/results"
    results.mkdir(parents=True)
    with_ours = (disk.conf / "a.conflist").read_bytes()

    def kept(config: bytes) -> dict[str, object]:
        # As libcni 1.2 writes it: libcni/api.go, cachedInfo.
        return {
            "kind": "cniCacheV1",
            "containerId": "0123",
            "config": base64.b64encode(config).decode(),
            "ifName": "eth0",
            "networkName": "a",
            "cniArgs": [["K8S_POD_NAME", "web"]],
            "result": {"ips": [{"address": "10.0.0.2/32"}]},
        }

    pod = results / "a-0123-eth0"
    pod.write_text(json.dumps(kept(with_ours)))
    others = {"b-4567-eth0": json.dumps(kept(OTHER)), "c": "no JSON", "d": "[]", "e": '{"kind": "cniCacheV1"}'}
    for name, text in others.items():
        (results / name).write_text(text)
    undone = cni_files.remove(disk.bin, disk.conf, tmp_path / "cache")
    assert str(pod) in undone
    after = json.loads(pod.read_text())
    listed = json.loads(base64.b64decode(after.pop("config")))
    assert [plugin["type"] for plugin in listed["plugins"]] == disk.types("a.conflist")
    assert after == {key: value for key, value in kept(b"").items() if key != "config"}
    assert {name: (results / name).read_text() for name in others} == others
