"""Which connections must come through a tunnel (POL-01): by mesh, namespace, workload and port, edited in place."""

from __future__ import annotations

import pytest
from e2e_mesh import POLICY_DELAY
from e2e_pods import APP_PORT, eventually
from test_e2e_policy import CALLERS, reaching

from undermesh.lab.cluster import ENROL_LABEL

pytestmark = pytest.mark.usefixtures("mesh")

EVERYONE = set(CALLERS)
IDENTIFIED = {"client", "other"}
FAR = "selector: {matchLabels: {app: far}}, "
OTHER_PORT = APP_PORT + 1000

# What there is (home, spec); who then reaches the app's port of `far`, and who another port of it.
STEPS = [
    ({"default": ("mesh", "mtls: {mode: STRICT}")}, IDENTIFIED, IDENTIFIED),
    (
        {
            "default": ("mesh", "mtls: {mode: STRICT}"),
            "ports": ("mesh", f"{FAR}portLevelMtls: {{{APP_PORT}: {{mode: PERMISSIVE}}}}"),
        },
        EVERYONE,
        IDENTIFIED,
    ),
    (
        {
            "default": ("mesh", "mtls: {mode: DISABLE}"),
            "ports": ("mesh", f"{FAR}portLevelMtls: {{{APP_PORT}: {{mode: STRICT}}}}"),
        },
        IDENTIFIED,
        EVERYONE,
    ),
    ({"default": ("undermesh-system", "mtls: {mode: STRICT}")}, IDENTIFIED, IDENTIFIED),
    ({}, EVERYONE, EVERYONE),
]


def documents(objects: dict[str, tuple[str, str]]) -> str:
    return "\n---\n".join(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n"
        f"metadata: {{name: {name}, namespace: {home}}}\nspec: {{{spec}}}"
        for name, (home, spec) in objects.items()
    )


def test_the_nearest_mode_holds_and_identified_clients_always_pass(cluster, pods):
    file = cluster.source.path / "peer-authentication.yaml"
    try:
        for objects, on_port, elsewhere in STEPS:
            if objects:
                cluster.write(file.name, documents(objects))
            else:
                file.unlink()
            for port, expected in ((APP_PORT, on_port), (OTHER_PORT, elsewhere)):
                found = eventually(
                    lambda port=port: reaching(pods, CALLERS, "far", port),
                    lambda found, expected=expected: found == expected,
                    POLICY_DELAY,
                )
                assert found == expected, (objects, port)
    finally:
        file.unlink(missing_ok=True)


FLIPS = 3


def test_strict_begins_and_ends_with_what_peers_know_of_a_running_pod(steady, pods, way, cluster):
    """A peer in the mesh is never refused while the pod joins and leaves."""
    file = cluster.source.path / "peer-authentication.yaml"
    cluster.write(file.name, documents({"strict": ("flap", "mtls: {mode: STRICT}")}))
    one = way("client", "flapserver", 4)
    try:
        eventually(lambda: reaching(pods, ["client", "outside1"], "flapserver"), lambda found: found == {"client"}, 5.0)
        with pods["flapserver"].listening([["echo"]], APP_PORT):
            load = one.client.load(one.host, APP_PORT, workers=2)
            try:
                for _ in range(FLIPS):
                    for label, state in ((None, "plain"), ("enabled", "enrolled")):
                        cluster.label_namespace("flap", {ENROL_LABEL: label})
                        cluster.wait_pods("flap", state, 20)
            finally:
                cluster.label_namespace("flap", {ENROL_LABEL: "enabled"})
                report = load.stop()
        assert report["errors"] == [], report["errors"][:5]
        assert report["done"] > 50
        cluster.wait_pods("flap", "enrolled", 20)
        assert reaching(pods, ["client", "outside1"], "flapserver") == {"client"}
    finally:
        file.unlink(missing_ok=True)
    steady.wait_whole()
