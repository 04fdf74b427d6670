"""Files that are wrong: the agent says which and why, and the last good state stands."""

from __future__ import annotations

import pytest
from e2e_pods import assert_refused, assert_works, eventually

DENY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: standing, namespace: mesh}
spec:
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/mesh/sa/other]}}]
"""
MISTAKES = {
    "no YAML": ("kind: [unclosed", "mistake.yaml"),
    "a field that policies do not have": (DENY.replace("principals", "principles"), "principles"),
    "an action that there is not": (DENY.replace("DENY", "REFUSE"), "REFUSE"),
    "a label of a wrong type": ("kind: Namespace\napiVersion: v1\nmetadata: {name: odd, labels: 7}\n", "labels"),
    "an object without a name": ("kind: Pod\napiVersion: v1\nmetadata: {namespace: mesh}\nspec: {}\n", "name"),
}


@pytest.mark.parametrize(("text", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_by_check_and_the_last_good_state_of_the_file_stands(mesh, cluster, way, text, named):
    def objects():
        checks = cluster.agent_api("node1", "/v1/check")["checks"]
        return next(check for check in checks if check["name"] == "objects")

    cluster.write("mistake.yaml", DENY)
    try:
        for node in cluster.nodes:
            eventually(lambda node=node: mesh.policies(node), lambda found: "mesh/standing" in found, 5.0)
        cluster.write("mistake.yaml", text)
        found = eventually(objects, lambda check: not check["ok"], 5.0)
        assert "mistake.yaml" in found["detail"] and named in found["detail"], found
        assert "\n" not in found["detail"] and found["next_step"]
        # What the file said before goes on, and so does everything else.
        assert_refused(way("other", "far", 4))
        assert_works(way("client", "far", 4))
        cluster.write("mistake.yaml", DENY)
        eventually(objects, lambda check: check["ok"], 5.0)
        assert_refused(way("other", "far", 4))
    finally:
        cluster.source.remove("mistake.yaml")
        for node in cluster.nodes:
            eventually(lambda node=node: mesh.policies(node), lambda found: "mesh/standing" not in found, 5.0)
    eventually(objects, lambda check: check["ok"], 5.0)
    assert_works(way("other", "far", 4))


def test_a_policy_whose_values_mean_nothing_denies_rather_than_admits_and_says_so(mesh, cluster, way):
    log = cluster.logs / "controlplane.log"
    cluster.write("mistake.yaml", DENY.replace("principals: [cluster.local/ns/mesh/sa/other]", "ipBlocks: [1.2.3]"))
    try:
        for node in cluster.nodes:
            eventually(lambda node=node: mesh.policies(node), lambda found: "mesh/standing" in found, 5.0)
        assert_refused(way("client", "far", 4))
        lines = [line for line in log.read_text().splitlines() if "AuthorizationPolicy mesh/standing" in line]
        assert "ipBlocks[0]" in lines[-1] and "'1.2.3'" in lines[-1] and "denies everybody" in lines[-1]
    finally:
        cluster.source.remove("mistake.yaml")
        for node in cluster.nodes:
            eventually(lambda node=node: mesh.policies(node), lambda found: "mesh/standing" not in found, 5.0)
    assert_works(way("client", "far", 4))


def test_check_is_all_well_when_all_is_well(mesh, cluster):
    for node in cluster.nodes:
        assert [check for check in cluster.agent_api(node, "/v1/check")["checks"] if not check["ok"]] == []
