"""The CNI chain as libcni runs it, with plugins that record how they were called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from undermesh.lab.runtime.cni import Attachment, Cni, CniError, addresses, load_network, plugin_config
from undermesh.lab.runtime.types import PortMapping

POD = Attachment(
    "id", "/run/netns/cni-x", "shop", "web", "uid-1", (PortMapping(80, 8080, "UDP", "1.2.3.4"), PortMapping(81, 0))
)

PLUGIN = """#!/bin/sh
name=$(basename "$0")
cat > "{calls}/$name.$CNI_COMMAND.json"
echo "$name $CNI_COMMAND" >> {calls}/order
env | grep ^CNI_ | sort > "{calls}/$name.$CNI_COMMAND.env"
{body}
"""


class Node:
    """Directories of a node and its plugins."""

    def __init__(self, root: Path) -> None:
        self.conf, self.bin, self.cache, self.calls = (root / name for name in ("net.d", "bin", "cache", "calls"))
        for directory in (self.conf, self.bin, self.calls):
            directory.mkdir()
        self.cni = Cni(self.conf, (root / "nowhere", self.bin), self.cache)

    def plugin(self, name: str, body: str = 'echo "{}"') -> None:
        path = self.bin / name
        path.write_text(PLUGIN.format(calls=self.calls, body=body))
        path.chmod(0o755)

    def network(self, *plugins: dict[str, Any]) -> None:
        (self.conf / "10.conflist").write_text(json.dumps({"cniVersion": "1.0.0", "name": "net", "plugins": plugins}))

    def order(self) -> list[str]:
        return (self.calls / "order").read_text().splitlines()

    def stdin(self, name: str, verb: str) -> dict[str, Any]:
        got: dict[str, Any] = json.loads((self.calls / f"{name}.{verb}.json").read_text())
        return got


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


FIRST = """[ "$CNI_COMMAND" = ADD ] && echo '{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.2/24"}]}' || :"""
SECOND = """[ "$CNI_COMMAND" = ADD ] && echo '{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.3/24"}]}' || :"""
FAILS = """echo '{"code":7,"msg":"no"}'; exit 1"""


async def test_results_are_handed_down_the_chain_and_deletion_goes_up_with_the_last(node: Node) -> None:
    node.plugin("first", FIRST)
    node.plugin("second", SECOND)
    node.network({"type": "first", "extra": 1}, {"type": "second"})
    result = await node.cni.add(POD)
    (node.conf / "10.conflist").unlink()
    await node.cni.check(POD)
    await node.cni.delete(POD)
    await node.cni.delete(POD)
    calls = [f"{name} {verb}" for verb in ("ADD", "CHECK") for name in ("first", "second")]
    assert node.order() == [*calls, "second DEL", "first DEL"]
    assert addresses(result) == ("10.0.0.3",)
    assert "prevResult" not in node.stdin("first", "ADD") and node.stdin("first", "ADD")["extra"] == 1
    assert node.stdin("second", "ADD")["prevResult"]["ips"] == [{"address": "10.0.0.2/24"}]
    assert node.stdin("first", "DEL")["prevResult"]["ips"] == [{"address": "10.0.0.3/24"}]
    assert not list(node.cache.iterdir())


async def test_a_plugin_gets_the_environment_of_the_specification(node: Node) -> None:
    node.plugin("first", FIRST)
    node.network({"type": "first"})
    await node.cni.add(POD)
    got = dict(line.split("=", 1) for line in (node.calls / "first.ADD.env").read_text().splitlines())
    assert got["CNI_COMMAND"] == "ADD" and got["CNI_CONTAINERID"] == "id" and got["CNI_NETNS"] == "/run/netns/cni-x"
    assert got["CNI_IFNAME"] == "eth0" and got["CNI_PATH"].endswith(str(node.bin))
    arguments = dict(pair.split("=") for pair in got["CNI_ARGS"].split(";"))
    assert arguments["K8S_POD_NAMESPACE"] == "shop" and arguments["K8S_POD_NAME"] == "web"
    assert arguments["K8S_POD_UID"] == "uid-1" and arguments["K8S_POD_INFRA_CONTAINER_ID"] == "id"


async def test_a_failed_addition_is_undone_in_every_plugin(node: Node) -> None:
    node.plugin("first", FIRST)
    node.plugin("second", f'[ "$CNI_COMMAND" = DEL ] && exit 0; {FAILS}')
    node.network({"type": "first"}, {"type": "second"})
    with pytest.raises(CniError, match=r'plugin type="second" name="net" failed \(add\): no \(code 7\)'):
        await node.cni.add(POD)
    assert node.order() == ["first ADD", "second ADD", "second DEL", "first DEL"]
    assert not list(node.cache.iterdir())


async def test_a_failed_deletion_still_asks_the_others_and_can_be_tried_again(node: Node) -> None:
    node.plugin("first", FIRST)
    node.plugin("second", SECOND)
    node.network({"type": "first"}, {"type": "second"})
    await node.cni.add(POD)
    node.plugin("second", FAILS)
    with pytest.raises(CniError, match=r"second.*failed \(del\)"):
        await node.cni.delete(POD)
    node.plugin("second", SECOND)
    await node.cni.delete(POD)
    assert node.order()[2:] == ["second DEL", "first DEL"] * 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        pytest.param("echo oh dear >&2; exit 3", "exit code 3: oh dear", id="no-json"),
        pytest.param("echo hello", "its result is not JSON", id="no-result"),
        pytest.param("exit 9", "exit code 9: it printed nothing", id="silent"),
    ],
)
async def test_what_a_broken_plugin_said_is_in_the_message(node: Node, body: str, said: str) -> None:
    node.plugin("first", f'[ "$CNI_COMMAND" = DEL ] && exit 0; {body}')
    node.network({"type": "first"})
    with pytest.raises(CniError, match=said):
        await node.cni.add(POD)


async def test_a_plugin_that_does_not_end_is_killed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undermesh.lab.runtime.cni.TIMEOUT", 0.2)
    node.plugin("first", '[ "$CNI_COMMAND" = DEL ] && exit 0; exec sleep 100')
    node.network({"type": "first"})
    with pytest.raises(CniError, match=r"no end after 0.2 s"):
        await node.cni.add(POD)


def test_only_capabilities_that_a_plugin_declares_reach_it() -> None:
    network = {"name": "net", "cniVersion": "1.0.0"}
    plain = plugin_config(network, {"type": "a"}, POD, None)
    mapped = plugin_config(network, {"type": "a", "capabilities": {"portMappings": True}}, POD, None)
    assert "runtimeConfig" not in plain
    assert mapped["runtimeConfig"]["portMappings"] == [
        {"hostPort": 8080, "containerPort": 80, "protocol": "udp", "hostIP": "1.2.3.4"}
    ]


def test_the_first_network_by_name_counts_and_a_single_plugin_is_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "20.conflist").write_text('{"cniVersion": "1.0.0", "name": "later", "plugins": [{"type": "x"}]}')
    (tmp_path / "10.conf").write_text('{"cniVersion": "0.4.0", "name": "first", "type": "y"}')
    (tmp_path / "00.txt").write_text("not looked at")
    found = load_network(tmp_path)
    assert found["name"] == "first" and [plugin["type"] for plugin in found["plugins"]] == ["y"]


@pytest.mark.parametrize("text", ["", "[]", '{"plugins": []}', '{"cniVersion": "1", "name": "x", "plugins": [{}]}'])
def test_what_is_no_network_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "10.conflist").write_text(text)
    with pytest.raises(CniError, match=r"10.conflist: not a CNI network"):
        load_network(tmp_path)


def test_a_missing_plugin_is_a_fault_of_the_node(node: Node) -> None:
    node.network({"type": "absent"})
    assert "failed to find plugin 'absent' in path" in (node.cni.fault() or "")
