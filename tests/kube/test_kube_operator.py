"""What operators ask of a cluster all day, with the real kubectl: each row a command and what a cluster answers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest

from undermesh.lab.kube.cluster import KubeCluster

pytestmark = pytest.mark.root

LIST = """
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: ConfigMap, metadata: {name: first}, data: {a: b}}
- {apiVersion: v1, kind: ConfigMap, metadata: {name: second}}
"""
APP = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: moved}
spec:
  replicas: 0
  selector: {matchLabels: {app: moved}}
  template:
    metadata: {labels: {app: moved}}
    spec: {containers: [{name: c, image: nginx}]}
"""
UNKNOWN = "apiVersion: v1\nkind: Nope\nmetadata: {name: x}\n"
REVIEW = "apiVersion: authentication.k8s.io/v1\nkind: TokenReview\nspec: {token: abc}\n"


RANGE = """
apiVersion: v1
kind: LimitRange
metadata: {name: range, namespace: bounded}
spec: {limits: [{type: Container, default: {cpu: 200m}, defaultRequest: {cpu: 100m}, max: {cpu: "1"}}]}
"""
CLAIM = """
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: claim}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: stored}
spec:
  containers: [{name: c, image: nginx, volumeMounts: [{name: v, mountPath: /v}]}]
  volumes: [{name: v, persistentVolumeClaim: {claimName: claim}}]
"""


@pytest.fixture(scope="module", autouse=True)
def namespace(cluster: KubeCluster) -> Iterator[None]:
    """Everything of these tests goes with it."""
    cluster.kubectl("create", "namespace", "ops")
    cluster.kubectl("-n", "ops", "create", "deployment", "web", "--image=nginx")
    cluster.kubectl("-n", "ops", "rollout", "status", "deployment/web", "--timeout=30s")
    yield
    cluster.kubectl("delete", "namespace", "ops", "bounded", "--ignore-not-found")


def said(cluster: KubeCluster, command: str, stdin: str = "") -> str:
    """Both outputs of a command, whether it works or not."""
    done = cluster.run_kubectl("-n", "ops", *shlex.split(command), stdin=stdin)
    return done.stdout + done.stderr


ROWS = [
    ("apply -f -", LIST, r"configmap/first created\nconfigmap/second created"),
    ("apply -f -", LIST, r"configmap/first unchanged\nconfigmap/second unchanged"),
    ("apply -f -", LIST.replace("data:", "dat:"), r'unknown field "dat"'),
    ("apply -f -", UNKNOWN, r'no matches for kind "Nope" in version "v1"'),
    ("create -f - -o jsonpath={.status.error}", REVIEW, r"."),
    ("apply -f -", APP, r"deployment.apps/moved created"),
    ("apply --server-side -f -", APP, r"^deployment.apps/moved serverside-applied\n$"),
    ("apply --server-side --force-conflicts -f -", APP, r"^deployment.apps/moved serverside-applied\n$"),
    (
        "autoscale deployment/web --min=1 --max=4 --cpu-percent=80",
        "",
        r"horizontalpodautoscaler.autoscaling/web autosc",
    ),
    ("get hpa", "", r"web +Deployment/web +cpu: <unknown>/80% +1 +4"),
    ("get --raw /apis/autoscaling/v1/namespaces/ops/horizontalpodautoscalers/web", "", r'ercentage":80'),
    ("delete namespace default", "", r'namespaces "default" is forbidden: this namespace may not be deleted'),
    ("get --raw /readyz?verbose", "", r"\[\+\]etcd ok\n(.*\n)*readyz check passed"),
    (
        'patch deployment web --type=merge -p \'{"spec":{"selector":{"matchLabels":{"app":"q"}}}}\'',
        "",
        r'Invalid value: \{"app":"web"\}: `sel',
    ),
    ("create role one --verb=get,list,watch --resource=configmaps --resource-name=first", "", r"created"),
    ("create rolebinding one --role=one --user=bob", "", r"created"),
    ("get configmaps --field-selector metadata.name=first --as=bob", "", r"^NAME +DATA +AGE\nfirst "),
    ("get configmaps --as=bob", "", r'configmaps is forbidden: User "bob" cannot list resource "configmaps"'),
    ("run -i --rm --quiet brief --image=busybox --restart=Never -- echo said", "", r"^said\n$"),
    ("create namespace bounded", "", "created"),
    ("create quota -n bounded few --hard=pods=1,requests.cpu=1", "", "resourcequota/few created"),
    ("run -n bounded bare --image=nginx", "", r'"bare" is forbidden: failed quota: few: must specify requests.cpu for'),
    ("apply -f - --namespace=bounded", RANGE, "limitrange/range created"),
    ("run -n bounded one --image=nginx", "", "pod/one created"),
    (
        "get pod -n bounded one -o jsonpath={.spec.containers[0].resources}",
        "",
        r'"cpu":"200m"\},"requests":\{"cpu":"100m"',
    ),
    ("run -n bounded two --image=nginx", "", "exceeded quota: few, requested: pods=1, used: pods=1, limited: pods=1$"),
    ("get quota -n bounded", "", r"few +pods: 1/1, requests.cpu: 100m/1 +"),
    ("apply -f -", CLAIM, r"persistentvolumeclaim/claim created\npod/stored created"),
    ("wait pod/stored --for=jsonpath={.status.conditions[0].reason}=Unschedulable --timeout=5s", "", "condition met"),
    ("describe pod stored", "", r"FailedScheduling .*: pod has unbound immediate PersistentVolumeClaims\."),
    ("describe pvc claim", "", r"FailedBinding .*no persistent volumes available for this claim and no storage class"),
    ("get endpoints -n default kubernetes", "", r"172\.30\.0\.1:6443"),
    ("get node node1 -o jsonpath={.status.images[*].names[0]}", "", r"docker.io/library/nginx:latest"),
    ("top nodes", "", r"error: Metrics API not available"),
    ("certificate approve x", "", r'error: the server doesn\'t have a resource type "certificatesigningrequests"'),
]


@pytest.mark.parametrize(("command", "stdin", "answer"), ROWS, ids=[f"{row[0]} {n}" for n, row in enumerate(ROWS)])
def test_a_command_is_answered_as_on_a_cluster(cluster: KubeCluster, command: str, stdin: str, answer: str) -> None:
    found = said(cluster, command, stdin)
    assert re.search(answer, found), found


def test_debug_adds_a_container_that_sees_the_targets_processes(cluster: KubeCluster) -> None:
    pod = said(cluster, "get pods -l app=web -o name").strip()
    seen = said(cluster, f"debug {pod} -i --quiet --image=busybox --profile=general --target=nginx -c look -- ps -ef")
    assert re.search(r" 1 .*python", seen), seen
    told = said(cluster, f"describe {pod}")
    assert re.search(r"Ephemeral Containers:\n  look:", told), told
    assert said(cluster, f"get {pod} --no-headers").split()[1:4] == ["1/1", "Running", "0"]


def test_debug_copies_a_pod_and_opens_a_node(cluster: KubeCluster) -> None:
    pod = said(cluster, "get pods -l app=web -o name").strip()
    copied = said(cluster, f"debug {pod} --image=busybox --profile=general --copy-to=copy -c look -- sleep 60")
    assert "rror" not in copied
    waited = said(cluster, "wait pod/copy --for=condition=Ready --timeout=20s")
    assert "condition met" in waited, waited
    on_node = "debug node/node2 -i --quiet --image=busybox --profile=sysadmin -- chroot /host hostname"
    assert said(cluster, on_node).strip() == "node2"
