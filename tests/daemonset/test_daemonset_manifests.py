"""The chart: accepted by kubectl and the API server, no more rights than needed, every one explained."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cluster_harness import Cluster
from kubectl import Kubectl
from manifests import (
    LAUNCHERS,
    Object,
    container,
    controlplane_pod,
    hooks,
    node_pod,
    objects,
    rendered,
    template,
    the,
    uninstall_pod,
    uninstall_text,
)

from undermesh.agent import features, settings
from undermesh.agent import keeper as keeper_module
from undermesh.controlplane import options

SYSTEM = "undermesh-system"
POLICY = """
apiVersion: security.istio.io/{version}
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: default}}
spec: {spec}
"""
# What a deployment needs beside ours is built in; whoever runs the manifests has these kinds.
NAMESPACED = (
    "ConfigMap",
    "ServiceAccount",
    "Service",
    "PodDisruptionBudget",
    "Deployment",
    "DaemonSet",
    "Job",
    "Role",
    "RoleBinding",
)


@pytest.fixture
async def installed(kubectl: Kubectl) -> Kubectl:
    await kubectl("apply", "-f", "-", stdin=rendered())
    return kubectl


async def test_kubectl_applies_them_in_one_go_and_again_without_a_change(kubectl: Kubectl) -> None:
    first = (await kubectl("apply", "-f", "-", stdin=rendered())).splitlines()
    assert len(first) == len(objects()) and all(line.endswith(" created") for line in first), first
    again = (await kubectl("apply", "-f", "-", stdin=rendered())).splitlines()
    assert [line for line in again if not line.endswith(" unchanged")] == []


async def test_server_side_apply_accepts_every_field(kubectl: Kubectl) -> None:
    done = await kubectl.run("apply", "--server-side", "--validate=strict", "-f", "-", stdin=rendered())
    assert done.code == 0 and "unknown field" not in done.err, done.err


async def test_nothing_of_them_is_lost_in_the_server(installed: Kubectl, empty_cluster: Cluster) -> None:
    daemonset = await empty_cluster.get(f"/apis/apps/v1/namespaces/{SYSTEM}/daemonsets/undermesh-node")
    stored = container(daemonset["spec"]["template"]["spec"], "agent")
    declared = container(node_pod(), "agent")
    assert stored["securityContext"] == declared["securityContext"]
    assert stored["args"] == declared["args"] and len(stored["volumeMounts"]) == len(declared["volumeMounts"])


async def test_deleting_them_leaves_nothing(installed: Kubectl, empty_cluster: Cluster) -> None:
    await installed("delete", "--ignore-not-found", "-f", "-", "--wait=false", stdin=rendered())
    left = [row for row in empty_cluster.server.store.items("daemonsets", "") if "undermesh" in str(row.obj)]
    assert left == []


SPECS: dict[str, tuple[str, str]] = {
    "real": (
        "{selector: {matchLabels: {app: web}}, action: DENY, rules: [{from: [{source: {notPrincipals: [a],"
        " serviceAccounts: [x/y]}}], to: [{operation: {ports: ['80'], notMethods: [GET]}}],"
        " when: [{key: source.namespace, values: [a]}]}]}",
        "",
    ),
    "empty": ("{}", ""),
    "target": ("{targetRefs: [{kind: Service, name: web}]}", ""),
    "typo": ("{rules: [{from: [{source: {principal: [a]}}]}]}", "unknown field"),
    "verb": ("{action: FORBID}", "spec.action"),
    "key": ("{rules: [{when: [{values: [a]}]}]}", "key"),
    "number": ("{rules: [{to: [{operation: {ports: [80]}}]}]}", "ports"),
}


async def test_the_uninstall_is_accepted_and_has_the_agent_s_directories(installed: Kubectl) -> None:
    await installed("apply", "--validate=strict", "-f", "-", stdin=uninstall_text())
    paths = {v["name"]: v["hostPath"]["path"] for v in node_pod()["volumes"] if "hostPath" in v}
    mine = {v["name"]: v["hostPath"]["path"] for v in uninstall_pod()["volumes"]}
    assert mine == {name: path for name, path in paths.items() if name != "cgroup"} | {"cni-cache": "/var/lib/cni"}


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
async def test_policies_are_accepted_and_refused_as_istio_s_schema_says(installed: Kubectl, version: str) -> None:
    for name, (spec, error) in SPECS.items():
        text = POLICY.format(version=version, name=name, spec=spec)
        if error:
            assert error in await installed.fails("apply", "-f", "-", stdin=text), name
        else:
            await installed("apply", "-f", "-", stdin=text)
    columns = (await installed("get", "ap", "real")).splitlines()
    assert columns[0].split() == ["NAME", "ACTION", "ACCEPTED", "AGE"] and columns[1].split()[:2] == ["real", "DENY"]


PEER_SPECS = {
    "ports": ("{selector: {matchLabels: {app: web}}, portLevelMtls: {9090: {mode: PERMISSIVE}}}", ""),
    "strict": ("{mtls: {mode: STRICT}}", ""),
    "mode": ("{mtls: {mode: strict}}", "spec.mtls.mode"),
    "typo": ("{mtls: {mod: STRICT}}", "unknown field"),
}


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
async def test_modes_are_accepted_and_refused_as_istio_s_schema_says(installed: Kubectl, version: str) -> None:
    for name, (spec, error) in PEER_SPECS.items():
        text = POLICY.replace("AuthorizationPolicy", "PeerAuthentication").format(version=version, name=name, spec=spec)
        if error:
            assert error in await installed.fails("apply", "-f", "-", stdin=text), name
        else:
            await installed("apply", "-f", "-", stdin=text)
    columns = (await installed("get", "pa", "strict")).splitlines()
    assert columns[0].split() == ["NAME", "MODE", "ACCEPTED", "AGE"] and columns[1].split()[:2] == ["strict", "STRICT"]


def comment_above(text: str, needle: str) -> bool:
    """Whether the line that holds the needle, or one of the few above it, is explained."""
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if needle in line)
    while place > 0 and lines[place - 1].strip().startswith(("hostPath:", "- name:")):
        place -= 1
    return lines[place - 1].strip().startswith("#")


def test_every_host_path_capability_and_shared_namespace_is_explained() -> None:
    text = rendered()[rendered().index("kind: DaemonSet\nmetadata:\n  name: undermesh-node") :]
    pod = node_pod()
    needles = [f"path: {v['hostPath']['path']}" for v in pod["volumes"] if "hostPath" in v]
    needles += [f"- {name}" for c in pod["containers"] for name in c["securityContext"]["capabilities"]["add"]]
    needles += ["hostNetwork:", "hostPID:", "tolerations:", "appArmorProfile:"]
    assert len(needles) == 6 + 5 + 4
    assert [needle for needle in needles if not comment_above(text, needle)] == []


def containers() -> list[tuple[str, Object]]:
    return [(c["name"], c) for pod in (node_pod(), controlplane_pod()) for c in pod["containers"]]


@pytest.mark.parametrize(("name", "of"), containers(), ids=[name for name, _ in containers()])
def test_no_container_is_privileged_or_writes_to_its_image(name: str, of: Object) -> None:
    security = of["securityContext"]
    assert not security.get("privileged") and security["readOnlyRootFilesystem"]
    assert security["capabilities"]["drop"] == ["ALL"]
    assert {"readinessProbe", "livenessProbe"} <= of.keys() and of["resources"]["requests"]
    assert not any("hostPort" in port for port in of.get("ports", ()))


def test_the_agent_has_the_capabilities_that_it_asks_for_at_its_start() -> None:
    granted = container(node_pod(), "agent")["securityContext"]["capabilities"]["add"]
    assert {f"CAP_{name}" for name in granted} == features._CAPABILITIES.keys()


def test_only_the_agent_s_container_holds_a_token_and_the_host_s_directories() -> None:
    pod = node_pod()
    assert pod["automountServiceAccountToken"] is False
    assert [mount["name"] for mount in container(pod, "ztunnel")["volumeMounts"]] == ["run"]


def test_the_keeper_of_listeners_may_do_nothing_but_keep() -> None:
    pod = the("DaemonSet", "undermesh-keeper")["spec"]["template"]["spec"]
    (keeper,) = pod["containers"]
    security = keeper["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"]} and security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"] and not security["privileged"]
    assert pod["automountServiceAccountToken"] is False and "hostPID" not in pod
    (volume,) = (v["hostPath"]["path"] for v in pod["volumes"])
    run = next(v["hostPath"]["path"] for v in node_pod()["volumes"] if v["name"] == "run")
    assert volume == run and keeper["command"][-1] == f"{run}/{keeper_module.SOCKET_NAME}"
    assert all(pod[same] == node_pod()[same] for same in ("nodeSelector", "tolerations", "hostNetwork"))


def test_the_parts_understand_their_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [arg.replace("$(NODE_NAME)", "n1") for arg in container(node_pod(), "agent")["args"]]
    args = [arg.replace("/host/sys/fs/cgroup", str(tmp_path)) for arg in args]
    parsed = settings.parse([*args, f"--bpf-dir={tmp_path}"])
    assert (parsed.node, parsed.source.kind, parsed.source.path) == ("n1", "kubernetes", None)
    mounts = {mount["mountPath"] for mount in container(node_pod(), "agent")["volumeMounts"]}
    places = (parsed.run_dir, parsed.state_dir, parsed.cni_bin_dir, parsed.cni_conf_dir, parsed.pin_dir.parent)
    assert {str(path) for path in (*places, parsed.ca_root.parent, parsed.token.parent)} <= mounts
    found = options.parse([*container(controlplane_pod(), "controlplane")["args"], "--listen=[::]:15012"])
    assert found.token_review and found.namespace == SYSTEM


def test_names_refer_to_what_is_there() -> None:
    accounts = {obj["metadata"]["name"] for obj in (*objects(), *hooks()) if obj["kind"] == "ServiceAccount"}
    roles = {(obj["kind"], obj["metadata"]["name"]) for obj in (*objects(), *hooks())}
    for obj in (*objects(), *hooks()):
        namespace = obj["metadata"].get("namespace")
        assert (namespace == SYSTEM) == (obj["kind"] in NAMESPACED), obj["metadata"]["name"]
        for subject in obj.get("subjects", ()):
            assert subject["name"] in accounts and subject["namespace"] == SYSTEM
        if "roleRef" in obj:
            assert (obj["roleRef"]["kind"], obj["roleRef"]["name"]) in roles
    images = re.findall(r"image: (\S+)", rendered())
    assert all(image.startswith("undermesh/") and image.endswith(":dev") for image in images)


VALUES = """
image: {registry: registry.example/mesh, tag: v7, pullPolicy: Always, pullSecrets: [{name: secret}]}
trustDomain: example.org
clusterId: east
network: east-1
controlplane: {replicas: 1, logLevel: debug, logFormat: json, resources: {limits: {memory: 1Gi}},
  nodeSelector: {pool: system}, tolerations: [{key: system}], affinity: {podAntiAffinity: {}}}
agent: {logLevel: warning, resources: {requests: {cpu: 7m}}}
ztunnel: {logLevel: trace, resources: {requests: {cpu: 8m}}, drainGraceSeconds: 70, stopGraceSeconds: 9}
keeper: {resources: {requests: {cpu: 9m}}}
node: {nodeSelector: {pool: all}, tolerations: [{key: none}]}
cni: {binDir: /home/kubernetes/bin, confDir: /etc/cni/other}
uninstall: {graceSeconds: 7}
"""


async def test_every_value_arrives_where_it_belongs(kubectl: Kubectl, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(VALUES)
    option = f"--values={values}"
    await kubectl("apply", "--validate=strict", "-f", "-", stdin=rendered(option))
    node, plane = node_pod(option), controlplane_pod(option)
    agent, ztunnel = container(node, "agent"), container(node, "ztunnel")
    (controlplane,) = plane["containers"]
    assert {c["image"] for c in (agent, ztunnel, controlplane)} == {
        f"registry.example/mesh/{part}:v7" for part in ("agent", "ztunnel", "controlplane")
    }
    assert {c["imagePullPolicy"] for c in (agent, ztunnel, controlplane)} == {"Always"}
    assert node["imagePullSecrets"] == plane["imagePullSecrets"] == [{"name": "secret"}]
    shared = {"--trust-domain=example.org", "--cluster=east"}
    assert shared | {"--network=east-1", "--log-level=warning"} <= set(agent["args"])
    assert shared | {"--log-level=debug", "--log-format=json"} <= set(controlplane["args"])
    assert ztunnel["args"] == ["--log-level=trace", "--drain-grace=70", "--stop-grace=9"]
    assert node["terminationGracePeriodSeconds"] == 100
    assert (agent["resources"]["requests"]["cpu"], ztunnel["resources"]["requests"]["cpu"]) == ("7m", "8m")
    assert controlplane["resources"]["limits"] == {"memory": "1Gi"}
    keeper = the("DaemonSet", "undermesh-keeper", option)["spec"]["template"]["spec"]
    assert keeper["containers"][0]["resources"] == {"requests": {"cpu": "9m", "memory": "8Mi"}}
    assert keeper["nodeSelector"] == node["nodeSelector"] and keeper["tolerations"] == node["tolerations"]
    assert node["nodeSelector"] == {"kubernetes.io/os": "linux", "pool": "all"}
    assert plane["nodeSelector"] == {"kubernetes.io/os": "linux", "pool": "system"}
    assert (node["tolerations"], plane["tolerations"]) == ([{"key": "none"}], [{"key": "system"}])
    assert plane["affinity"] == {"podAntiAffinity": {}}
    assert the("Deployment", "undermesh", option)["spec"]["replicas"] == 1
    assert the("PodDisruptionBudget", "undermesh", option)["spec"]["maxUnavailable"] == 1
    for pod in (node, uninstall_pod(option)):
        paths = {v["name"]: v["hostPath"]["path"] for v in pod["volumes"] if "hostPath" in v}
        assert (paths["cni-bin"], paths["cni-conf"]) == ("/home/kubernetes/bin", "/etc/cni/other")


MISTAKES = {
    "image.tga=x": "additional properties 'tga' not allowed",
    "controlplane.replicas=0": "replicas",
    "agent.logLevel=loud": "logLevel",
    "cni.binDir=opt/cni": "binDir",
    "trustDomain=": "trustDomain",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_value_that_cannot_be_is_refused_by_its_name(mistake: str) -> None:
    done = template("--set", mistake)
    assert done.returncode != 0 and MISTAKES[mistake] in done.stderr


@pytest.mark.parametrize("launcher", sorted(LAUNCHERS.iterdir()), ids=lambda path: str(path.name))
def test_a_launcher_is_an_executable_shell_script(launcher: Path) -> None:
    assert launcher.stat().st_mode & 0o111 == 0o111
    assert subprocess.run(["sh", "-n", launcher], check=False).returncode == 0
