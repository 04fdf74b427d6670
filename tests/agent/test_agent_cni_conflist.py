"""Our plugin in a network configuration: what is written for what was read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undermesh.agent import cni_conflist
from undermesh.agent.cni_conflist import ConflistError

OURS = cni_conflist.entry("/run/undermesh/cni.sock", "/var/lib/undermesh/enrolled-namespaces")
PTP = {"type": "ptp", "mtu": 1450, "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.0.0.0/24"}]]}}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
OLD = {"type": "undermesh-cni", "socket": "/elsewhere"}


def a_list(*plugins: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"cniVersion": "1.0.0", "name": "net", **fields, "plugins": list(plugins)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param([PTP], [PTP, OURS], id="appended"),
        pytest.param([PTP, PORTMAP], [PTP, PORTMAP, OURS], id="after all others"),
        pytest.param([PTP, OURS], [PTP, OURS], id="already there"),
        pytest.param([PTP, OURS, PORTMAP], [PTP, OURS, PORTMAP], id="others after ours keep their place"),
        pytest.param([PTP, OLD, PORTMAP], [PTP, OURS, PORTMAP], id="an old entry is replaced where it stands"),
        pytest.param([OURS, PTP], [PTP, OURS], id="first, where there is no result yet"),
        pytest.param([PTP, OURS, OLD], [PTP, OURS], id="twice"),
    ],
)
def test_the_plugin_stands_once_and_after_a_result(before: list[Any], after: list[Any]) -> None:
    assert cni_conflist.chained("10-net.conflist", a_list(*before), OURS) == a_list(*after)


def test_unknown_fields_are_kept_in_their_order() -> None:
    text = json.dumps(a_list(PTP | {"new": [1, 2.5, None]}, disableCheck=True, cniVersions=["1.0.0", "1.1.0"]))
    after = cni_conflist.chained("x.conflist", cni_conflist.parse("x.conflist", text.encode()), OURS)
    written = json.loads(cni_conflist.dump(after), object_pairs_hook=list)
    assert [key for key, _ in written] == ["cniVersion", "name", "disableCheck", "cniVersions", "plugins"]
    assert cni_conflist.unchained(json.loads(cni_conflist.dump(after))) == json.loads(text)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.conflist", "{", "a.conflist is no JSON: "),
        ("a.conflist", "", "a.conflist is no JSON: "),
        ("a.conflist", "\xff", "a.conflist is no JSON: "),
        ("a.conflist", "[" * 100000, "a.conflist is no JSON: "),
        ("a.conflist", "[]", "a.conflist holds no JSON object"),
        ("a.conflist", '{"name": "n"}', "a.conflist has no plugins, or one without a type"),
        ("a.conflist", '{"name": "n", "plugins": []}', "a.conflist has no plugins"),
        ("a.conflist", '{"name": "n", "plugins": {"type": "ptp"}}', "a.conflist has no plugins"),
        ("a.conflist", '{"name": "n", "plugins": [{"type": "ptp"}, {}]}', "or one without a type"),
        ("a.conflist", '{"plugins": [{"type": "ptp"}]}', "a.conflist has no name"),
        ("a.conf", '{"name": "n"}', "a.conf names no plugin type"),
        ("a.json", '{"name": "n", "type": 5}', "a.json names no plugin type"),
    ],
)
def test_what_no_runtime_would_use_is_an_error_that_names_the_file(name: str, text: str, reason: str) -> None:
    with pytest.raises(ConflistError, match=re.escape(reason)):
        cni_conflist.parse(name, text.encode("latin-1"))


@pytest.mark.parametrize("version", [None, "", "0.1.0", "0.2.0", "2.0.0", 1])
def test_a_version_without_results_of_earlier_plugins_is_refused(version: Any) -> None:
    configuration = {k: v for k, v in a_list(PTP, cniVersion=version).items() if v is not None}
    with pytest.raises(ConflistError, match=r"a.conflist has cniVersion .*: no plugin can be chained"):
        cni_conflist.chained("a.conflist", configuration, OURS)
    with pytest.raises(ConflistError, match="no plugin can be chained"):
        cni_conflist.wrapped("a.conf", {**PTP, "cniVersion": version}, OURS)


def test_a_list_of_nothing_but_ours_is_refused() -> None:
    with pytest.raises(ConflistError, match="no plugin that makes an interface"):
        cni_conflist.chained("a.conflist", a_list(OURS), OURS)


@pytest.mark.parametrize(("fields", "name"), [({"name": "net"}, "net"), ({}, "10-x")])
def test_one_plugin_becomes_a_list_of_two(fields: dict[str, str], name: str) -> None:
    source = {"cniVersion": "0.3.1", **fields, **PTP}
    assert cni_conflist.wrapped("10-x.conf", source, OURS) == {
        "cniVersion": "0.3.1",
        "name": name,
        "plugins": [PTP, OURS],
    }


@given(st.from_regex(r"[0-9a-z][0-9a-z._-]{0,12}\.(conf|json)", fullmatch=True))
def test_a_wrapper_sorts_ahead_of_what_it_stands_for_and_a_backup_is_no_configuration(name: str) -> None:
    wrapper = cni_conflist.wrapper_name(name)
    assert wrapper < name and cni_conflist.is_wrapper(wrapper) and cni_conflist.is_list(wrapper)
    backup = cni_conflist.backup_name(name)
    assert cni_conflist.is_backup(backup) and not backup.endswith(cni_conflist.EXTENSIONS)


def test_the_versions_are_those_of_the_plugin() -> None:
    source = (Path(__file__).parents[2] / "cni/src/config.rs").read_text()
    found = re.search(r"VERSIONS: \[&str; \d+\] = \[(.*?)\]", source)
    assert found and tuple(json.loads(f"[{found[1]}]")) == cni_conflist.VERSIONS
