"""What the lab reads from YAML, and how it turns into network and services."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from undermesh.lab import manifest, network, services
from undermesh.lab.errors import LabError, ManifestError
from undermesh.lab.source import SourceDirectory

DEMO = Path(__file__).parent / "cluster"


def pod(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "kind": "Pod",
        "metadata": {"name": "a", "namespace": "ns", "uid": "u-1", "labels": {"app": "a"}},
        "spec": {"nodeName": "n1", "containers": [{"ports": [{"name": "web", "containerPort": 8080}]}]},
        "status": {"podIPs": [{"ip": "fd00::1"}, {"ip": "10.0.0.1"}]},
    }
    return {**made, **changes}


def service(**spec: Any) -> dict[str, Any]:
    whole = {"clusterIPs": ["10.96.0.1"], "selector": {"app": "a"}, "ports": [{"port": 80}], **spec}
    return {"kind": "Service", "metadata": {"name": "s", "namespace": "ns"}, "spec": whole}


def test_the_demo_has_two_nodes_and_pods_of_both_families_on_each() -> None:
    demo = manifest.load(DEMO)
    assert [node.name for node in demo.nodes] == ["node1", "node2"]
    assert {each.node for each in demo.pods} == {"node1", "node2"}
    assert all([":" in address for address in each.addresses] == [False, True] for each in demo.pods)
    assert {each.node for each in demo.host_pods} == {"node1", "node2"}


@pytest.mark.parametrize(
    ("item", "said"),
    [
        pytest.param(pod(metadata={"name": "a"}), "Pod -/a: metadata.uid is missing", id="no uid"),
        pytest.param(pod(spec={"containers": []}), "spec.nodeName is missing", id="no node"),
        pytest.param(pod(status={}), "status is missing", id="no status"),
        pytest.param(pod(status={"podIPs": [{"ip": "10.0.0.300"}]}), "10.0.0.300", id="no address"),
        pytest.param({"kind": "Service", "metadata": {"name": "s"}}, "Service -/s: spec is missing", id="no spec"),
    ],
)
def test_an_object_that_cannot_be_built_is_named(item: dict[str, Any], said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        manifest.build([item])


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ManifestError, match=r"bad\.yaml: not valid YAML"):
        manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        pytest.param(
            {}, "ip daddr 10.96.0.1 tcp dport 80 dnat ip to numgen inc mod 1 map { 0 : 10.0.0.1 . 80 }", id="port"
        ),
        pytest.param({"ports": [{"port": 80, "targetPort": "web"}]}, "0 : 10.0.0.1 . 8080", id="named port"),
        pytest.param({"clusterIPs": ["fd00:96::1"]}, "ip6 daddr fd00:96::1 tcp dport 80 dnat ip6", id="IPv6"),
        pytest.param({"selector": {"app": "b"}}, "dport 80 reject with tcp reset", id="no endpoints"),
        pytest.param({"ports": [{"port": 80, "targetPort": "x"}]}, "reject with tcp reset", id="unknown port name"),
    ],
)
def test_a_service_becomes_a_rule(changes: dict[str, Any], rule: str) -> None:
    assert rule in services.ruleset(manifest.build([pod(), service(**changes)]))


def test_a_pods_addresses_are_routed_on_every_node() -> None:
    built = manifest.build([pod(), {"kind": "Node", "metadata": {"name": "n2"}}])
    here, there = built.nodes
    assert f"route add 10.0.0.1/32 dev {network.host_side(built.pods[0])}" in network.pod_link(built.pods[0], "x")
    assert f"route add 10.0.0.1/32 via {here.addresses[0]} dev u0" in network.node_commands(built, there)
    assert not [line for line in network.node_commands(built, here) if "10.0.0.1" in line]


@pytest.mark.parametrize(
    ("labels", "left"),
    [
        pytest.param({"m": "on"}, {"keep": "1", "m": "on"}, id="added"),
        pytest.param({"keep": None}, {}, id="taken away"),
        pytest.param({"gone": None}, {"keep": "1"}, id="taken away where there was none"),
    ],
)
def test_labels_of_a_namespace_are_changed_in_its_file(
    tmp_path: Path, labels: dict[str, str | None], left: dict[str, str]
) -> None:
    template = tmp_path / "template"
    template.mkdir()
    (template / "ns.yaml").write_text("kind: Namespace\nmetadata: {name: ns, labels: {keep: '1'}}\n---\nkind: X\n")
    source = SourceDirectory(tmp_path / "source", template)
    source.label_namespace("ns", labels)
    first, second = yaml.safe_load_all((source.path / "ns.yaml").read_text())
    assert first["metadata"]["labels"] == left
    assert second == {"kind": "X"}
    with pytest.raises(LabError, match="Namespace other"):
        source.label_namespace("other", labels)
