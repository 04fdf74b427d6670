"""What an operator does with kubectl: create, apply, look, change, delete."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from api_client import Client
from kubectl import Kubectl

WEB = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: nginx:1.27
        ports: [{containerPort: 80, name: http}]
        env: [{name: A, value: "1"}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  ipFamilyPolicy: PreferDualStack
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
"""
WIDGETS = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: widgets, kind: Widget, shortNames: [wd], categories: [all]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}, scale: {specReplicasPath: .spec.replicas, statusReplicasPath: .status.replicas}}
    additionalPrinterColumns:
    - {name: Size, type: integer, jsonPath: .spec.size}
    - {name: Age, type: date, jsonPath: .metadata.creationTimestamp}
    - {name: Color, type: string, jsonPath: .spec.color, priority: 1}
    schema:
      openAPIV3Schema:
        type: object
        required: [spec]
        properties:
          spec:
            type: object
            description: What it should be.
            required: [size]
            properties:
              size: {type: integer, minimum: 1}
              color: {type: string, enum: [red, blue], default: red}
              replicas: {type: integer, default: 1}
          status: {type: object, x-kubernetes-preserve-unknown-fields: true}
"""
WIDGET = "{apiVersion: example.com/v1, kind: Widget, metadata: {name: w}, spec: {size: 3}}"


def columns(table: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]


async def value(kubectl: Kubectl, what: str, path: str) -> str:
    return await kubectl("get", *what.split(), "-o", f"jsonpath={path}")


async def test_apply_creates_then_changes_then_leaves_alone(kubectl: Kubectl) -> None:
    assert await kubectl("apply", "-f", "-", stdin=WEB) == "deployment.apps/web created\nservice/web created\n"
    assert await kubectl("apply", "-f", "-", stdin=WEB) == "deployment.apps/web unchanged\nservice/web unchanged\n"
    changed = WEB.replace("nginx:1.27", "nginx:1.28").replace('{name: A, value: "1"}', '{name: B, value: "2"}')
    diff = await kubectl.run("diff", "-f", "-", stdin=changed)
    assert diff.code == 1 and "+        image: nginx:1.28" in diff.out
    assert "deployment.apps/web configured" in await kubectl("apply", "-f", "-", stdin=changed)
    assert await value(kubectl, "deploy web", "{.spec.template.spec.containers[0].env}") == '[{"name":"B","value":"2"}]'
    assert await value(kubectl, "deploy web", "{.metadata.generation}") == "2"


async def test_tables_look_as_on_a_cluster(kubectl: Kubectl) -> None:
    await kubectl("apply", "-f", "-", stdin=WEB)
    head, row = columns(await kubectl("get", "deploy", "-o", "wide"))
    assert head == ["NAME", "READY", "UP-TO-DATE", "AVAILABLE", "AGE", "CONTAINERS", "IMAGES", "SELECTOR"]
    assert row[:4] == ["web", "0/2", "0", "0"] and row[5:] == ["web", "nginx:1.27", "app=web"]
    rows = columns(await kubectl("get", "svc"))
    assert rows[0] == ["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE"]
    assert rows[1][:5] == ["kubernetes", "ClusterIP", "10.96.0.1", "<none>", "443/TCP"]
    assert re.fullmatch(r"80:3\d{4}/TCP", rows[2][4])
    assert columns(await kubectl("get", "ns"))[1][:2] == ["default", "Active"]
    assert "IPs:                      10.96.0.10,fd00:96::a" in await kubectl("describe", "svc", "web")


CREATED = [
    "namespace shop",
    "deployment d --image=nginx:1 --port=80 --replicas=3 -- sleep 1",
    "job j --image=x -- true",
    "cronjob c --image=x --schedule=*/5 * * * *",
    "configmap m --from-literal=a=b",
    "secret generic s --from-literal=a=b",
    "serviceaccount bob",
    "service clusterip cs --tcp=80:8080",
    "service nodeport ns --tcp=80:8080",
    "service externalname es --external-name=example.com",
    "ingress i --rule=foo.com/bar=svc1:8080",
    "poddisruptionbudget p --selector=app=x --min-available=1",
    "role r --verb=get --resource=pods",
    "rolebinding rb --role=r --serviceaccount=default:bob",
    "clusterrole cr --verb=* --resource=deployments.apps",
    "clusterrolebinding crb --clusterrole=cr --user=u",
    "priorityclass pc --value=10",
    "quota q --hard=pods=2,requests.cpu=1",
]


@pytest.mark.parametrize("command", CREATED)
async def test_create_makes_the_object_that_a_client_side_dry_run_shows(kubectl: Kubectl, command: str) -> None:
    words, tail, program = command.replace("*/5 * * * *", "*/5~*~*~*~*").partition(" -- ")
    arguments = [word.replace("~", " ") for word in words.split()]
    rest = ["--", *program.split()] if tail else []
    wanted = json.loads(await kubectl("create", *arguments, "--dry-run=client", "-o", "json", *rest))
    found = json.loads(await kubectl("create", *arguments, "-o", "json", *rest))
    assert _holds(found, wanted), (found, wanted)


def _holds(found: Any, wanted: Any) -> bool:
    """Whether everything that `wanted` says is in `found`; empty values say nothing."""
    if isinstance(wanted, dict):
        return all(_holds((found or {}).get(key), item) for key, item in wanted.items() if key != "status")
    if isinstance(wanted, list):
        return len(found or ()) == len(wanted) and all(map(_holds, found or (), wanted))
    return not wanted or found == wanted


async def test_changes_by_label_annotate_scale_patch_set_and_edit(kubectl: Kubectl) -> None:
    await kubectl("apply", "-f", "-", stdin=WEB)
    await kubectl("label", "deploy", "web", "tier=front")
    assert "already has a value" in await kubectl.fails("label", "deploy", "web", "tier=back")
    await kubectl("label", "deploy", "web", "tier=back", "--overwrite")
    await kubectl("annotate", "deploy", "web", "note=yes")
    await kubectl("scale", "deploy", "web", "--replicas=5")
    await kubectl("set", "image", "deploy/web", "web=nginx:1.29")
    await kubectl("set", "env", "deploy/web", "B=2")
    patch = '{"spec":{"template":{"spec":{"containers":[{"name":"side","image":"s"}]}}}}'
    await kubectl("patch", "deploy", "web", "-p", patch)
    await kubectl(
        "patch", "deploy", "web", "--type=json", "-p", '[{"op":"remove","path":"/metadata/annotations/note"}]'
    )
    await kubectl("rollout", "restart", "deploy/web")
    found = json.loads(await kubectl("get", "deploy", "web", "-o", "json"))
    containers = {c["name"]: c for c in found["spec"]["template"]["spec"]["containers"]}
    assert found["metadata"]["labels"] == {"app": "web", "tier": "back"}
    assert "note" not in found["metadata"]["annotations"] and found["spec"]["replicas"] == 5
    assert containers["web"]["image"] == "nginx:1.29" and set(containers) == {"web", "side"}
    assert [item["name"] for item in containers["web"]["env"]] == ["A", "B"]
    assert "kubectl.kubernetes.io/restartedAt" in found["spec"]["template"]["metadata"]["annotations"]


async def test_rollout_status_and_wait_follow_the_status(kubectl: Kubectl, api: Client) -> None:
    await kubectl("apply", "-f", "-", stdin=WEB)
    rollout = asyncio.create_task(kubectl("rollout", "status", "deploy/web", "--timeout=20s"))
    wait = asyncio.create_task(kubectl("wait", "deploy/web", "--for=condition=Available", "--timeout=20s"))
    await asyncio.sleep(1)
    assert not rollout.done() and not wait.done()
    condition = {"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable", "message": ""}
    counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), 2)
    status = {"observedGeneration": 1, "conditions": [condition], **counts}
    await api.patch("/apis/apps/v1/namespaces/default/deployments/web/status", {"status": status})
    assert "successfully rolled out" in await rollout
    assert await wait == "deployment.apps/web condition met\n"


async def test_server_side_apply_shares_and_defends_fields(kubectl: Kubectl) -> None:
    await kubectl("apply", "--server-side", "-f", "-", stdin=WEB)
    await kubectl("scale", "deploy", "web", "--replicas=9")
    error = await kubectl.fails("apply", "--server-side", "-f", "-", stdin=WEB.replace("replicas: 2", "replicas: 4"))
    assert 'conflict with "kubectl" with subresource "scale" using apps/v1: .spec.replicas' in error
    forced = WEB.replace("replicas: 2", "replicas: 4")
    await kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=forced)
    assert await value(kubectl, "deploy web", "{.spec.replicas}") == "4"
    await kubectl(
        "apply",
        "--server-side",
        "-f",
        "-",
        stdin=WEB.replace('env: [{name: A, value: "1"}]', "").replace("replicas: 2", "replicas: 4"),
    )
    assert await value(kubectl, "deploy web", "{.spec.template.spec.containers[0].env}") == ""


async def test_client_side_apply_moves_over_to_server_side(kubectl: Kubectl) -> None:
    await kubectl("apply", "-f", "-", stdin=WEB)
    await kubectl("apply", "--server-side", "-f", "-", stdin=WEB.replace("nginx:1.27", "nginx:1.28"))
    assert await value(kubectl, "deploy web", "{.spec.template.spec.containers[*].image}") == "nginx:1.28"


async def test_a_watch_shows_each_state(kubectl: Kubectl) -> None:
    process = await kubectl.start("get", "pods", "-w", "--output-watch-events")
    assert process.stdout is not None
    try:
        await kubectl("run", "p", "--image=x")
        assert (await asyncio.wait_for(process.stdout.readline(), 10)).split()[0] == b"EVENT"
        assert (await asyncio.wait_for(process.stdout.readline(), 10)).split()[:3] == [b"ADDED", b"p", b"0/1"]
        await kubectl("label", "pod", "p", "a=b")
        assert (await asyncio.wait_for(process.stdout.readline(), 10)).split()[0] == b"MODIFIED"
        await kubectl("delete", "pod", "p")
        assert (await asyncio.wait_for(process.stdout.readline(), 10)).split()[0] == b"DELETED"
    finally:
        await kubectl.stop(process)


REFUSED = [
    (("get", "pods", "nope"), "", 'Error from server (NotFound): pods "nope" not found'),
    (("get", "nonsense"), "", 'the server doesn\'t have a resource type "nonsense"'),
    (("create", "ns", "default"), "", 'Error from server (AlreadyExists): namespaces "default" already exists'),
    (("create", "ns", "Bad_"), "", 'The Namespace "Bad_" is invalid'),
    (("get", "pods", "--field-selector=foo=bar"), "", "field label not supported: foo"),
    (
        ("apply", "-f", "-"),
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: x}, dataa: {}}",
        'unknown field "dataa"',
    ),
    (("apply", "-f", "-"), WEB.replace("app: web}}\n  template", "app: b}}\n  template"), "`selector` does not match"),
    (("apply", "-f", "-"), WEB.replace("replicas: 2", "replicas: two"), "cannot unmarshal string"),
    (("apply", "-f", "-", "-n", "gone"), WEB, 'namespaces "gone" not found'),
    (
        ("run", "p", "--image=x", "--overrides", '{"spec":{"serviceAccountName":"no"}}'),
        "",
        'serviceaccount "no" not found',
    ),
]


@pytest.mark.parametrize(("arguments", "stdin", "message"), REFUSED)
async def test_refusals_read_as_on_a_cluster(
    kubectl: Kubectl, arguments: tuple[str, ...], stdin: str, message: str
) -> None:
    assert message in await kubectl.fails(*arguments, stdin=stdin)


async def test_a_namespace_goes_with_all_that_is_in_it(kubectl: Kubectl) -> None:
    await kubectl("create", "ns", "shop")
    await kubectl("apply", "-n", "shop", "-f", "-", stdin=WEB)
    await kubectl("delete", "ns", "shop", "--timeout=20s")
    assert "not found" in await kubectl.fails("get", "ns", "shop")
    assert await kubectl("get", "all", "-n", "shop") == ""


async def test_custom_resources_are_first_class(kubectl: Kubectl) -> None:
    await kubectl("apply", "-f", "-", stdin=WIDGETS)
    await kubectl("wait", "--for=condition=established", "crd/widgets.example.com", "--timeout=10s")
    await kubectl("apply", "-f", "-", stdin=WIDGET)
    assert columns(await kubectl("get", "wd"))[0] == ["NAME", "SIZE", "AGE"]
    assert columns(await kubectl("get", "wd", "-o", "wide"))[1][3] == "red"
    assert "What it should be." in await kubectl("explain", "widget.spec")
    assert "greater than or equal to 1" in await kubectl.fails("apply", "-f", "-", stdin=WIDGET.replace("3", "0"))
    await kubectl("scale", "widget/w", "--replicas=4")
    await kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=WIDGET)
    assert await value(kubectl, "widget w", "{.spec.replicas}") == "4"
    assert 'supported values: "red", "blue"' in await kubectl.fails(
        "patch", "wd", "w", "--type=merge", "-p", '{"spec":{"color":"green"}}'
    )
    assert "widget.example.com/w" in await kubectl("get", "all")
    await kubectl("delete", "crd", "widgets.example.com")
    assert "could not find the requested resource" in (await kubectl.fails("get", "--raw", "/apis/example.com/v1"))


async def test_a_node_is_described_cordoned_and_drained(kubectl: Kubectl, api: Client) -> None:
    conditions = [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "ok"}]
    status = {"capacity": {"cpu": "4"}, "allocatable": {"cpu": "4"}, "conditions": conditions}
    await api.create("/api/v1/nodes", {"metadata": {"name": "n1"}, "status": status})
    spec = {"nodeName": "n1", "containers": [{"name": "c", "image": "x", "resources": {"requests": {"cpu": "100m"}}}]}
    await api.create("/api/v1/namespaces/default/pods", {"metadata": {"name": "p"}, "spec": spec})
    assert "100m (2%)" in await kubectl("describe", "node", "n1")
    drain = asyncio.create_task(kubectl("drain", "n1", "--force", "--timeout=20s"))
    async with api.watch("/api/v1/namespaces/default/pods?watch=1&fieldSelector=metadata.name=p") as events:
        async for event in events:
            if event["object"]["metadata"].get("deletionTimestamp"):
                break
    await api.delete("/api/v1/namespaces/default/pods/p", {"gracePeriodSeconds": 0})
    assert "node/n1 drained" in await drain
    assert columns(await kubectl("get", "nodes"))[1][1] == "Ready,SchedulingDisabled"
    await kubectl("uncordon", "n1")
    await kubectl("taint", "node", "n1", "a=b:NoSchedule")
    assert await value(kubectl, "node n1", "{.spec.taints[0].key}") == "a"


async def test_tokens_and_questions_about_rights(kubectl: Kubectl) -> None:
    await kubectl("create", "sa", "bob")
    assert (await kubectl("create", "token", "bob")).count(".") == 2
    assert "kubernetes-admin" in await kubectl("auth", "whoami")
    assert await kubectl("auth", "can-i", "create", "pods") == "yes\n"
