"""Request bodies in protobuf, which kubectl sends for kinds that it knows by type (`kubectl create deployment`).

Only decoding, and only of the messages that such clients write: a body with a field that the table does not name is
refused. Names and types of fields come from the schemas of the kinds; what is here are their numbers on the wire.
https://kubernetes.io/docs/reference/using-api/api-concepts/#protobuf-encoding-idl
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Any

from undermesh.lab.apiserver import models
from undermesh.lab.apiserver.errors import Object, bad_request
from undermesh.lab.apiserver.kinds import BUILT_IN
from undermesh.lab.apiserver.schema import Node, Shape

MEDIA_TYPE = "application/vnd.kubernetes.protobuf"
MAGIC = b"k8s\0"

_OBJECT = "metadata spec status"
_REQUIRED_AND_PREFERRED = (
    "requiredDuringSchedulingIgnoredDuringExecution preferredDuringSchedulingIgnoredDuringExecution"
)
_NUMBERS: dict[str, str] = {
    "ObjectMeta": "name generateName namespace selfLink uid resourceVersion generation creationTimestamp "
    "deletionTimestamp deletionGracePeriodSeconds labels annotations ownerReferences finalizers 17:managedFields",
    "OwnerReference": "kind 3:name uid apiVersion controller blockOwnerDeletion",
    "LabelSelector": "matchLabels matchExpressions",
    "LabelSelectorRequirement": "key operator values",
    "DeleteOptions": "gracePeriodSeconds preconditions orphanDependents propagationPolicy dryRun",
    "Preconditions": "uid resourceVersion",
    "Namespace": _OBJECT,
    "NamespaceSpec": "finalizers",
    "ConfigMap": "metadata data binaryData immutable",
    "Secret": "metadata data type stringData immutable",
    "ServiceAccount": "metadata secrets imagePullSecrets automountServiceAccountToken",
    "LocalObjectReference": "name",
    "ObjectReference": "kind namespace name uid apiVersion resourceVersion fieldPath",
    "Service": _OBJECT,
    "ServiceSpec": "ports selector clusterIP type externalIPs 7:sessionAffinity loadBalancerIP "
    "loadBalancerSourceRanges "
    "externalName externalTrafficPolicy healthCheckNodePort publishNotReadyAddresses 17:ipFamilyPolicy clusterIPs "
    "ipFamilies allocateLoadBalancerNodePorts loadBalancerClass internalTrafficPolicy trafficDistribution",
    "ServicePort": "name protocol port targetPort nodePort appProtocol",
    "Deployment": _OBJECT,
    "DeploymentSpec": "replicas selector template strategy minReadySeconds revisionHistoryLimit paused "
    "9:progressDeadlineSeconds",
    "DeploymentStrategy": "type rollingUpdate",
    "RollingUpdateDeployment": "maxUnavailable maxSurge",
    "PodTemplateSpec": "metadata spec",
    "PodSpec": "volumes containers restartPolicy terminationGracePeriodSeconds activeDeadlineSeconds dnsPolicy "
    "nodeSelector serviceAccountName serviceAccount nodeName hostNetwork hostPID hostIPC securityContext "
    "imagePullSecrets hostname subdomain affinity schedulerName initContainers automountServiceAccountToken "
    "tolerations "
    "hostAliases priorityClassName priority dnsConfig shareProcessNamespace readinessGates runtimeClassName "
    "enableServiceLinks preemptionPolicy overhead topologySpreadConstraints ephemeralContainers setHostnameAsFQDN os "
    "hostUsers",
    "Pod": _OBJECT,
    "PodSecurityContext": "seLinuxOptions runAsUser runAsNonRoot supplementalGroups fsGroup runAsGroup sysctls "
    "windowsOptions fsGroupChangePolicy seccompProfile appArmorProfile supplementalGroupsPolicy",
    "SeccompProfile": "type localhostProfile",
    "Sysctl": "name value",
    "SecurityContext": "capabilities privileged seLinuxOptions runAsUser runAsNonRoot readOnlyRootFilesystem "
    "allowPrivilegeEscalation runAsGroup procMount windowsOptions seccompProfile appArmorProfile",
    "Capabilities": "add drop",
    "Toleration": "key operator value effect tolerationSeconds",
    "HostAlias": "ip hostnames",
    "PodDNSConfig": "nameservers searches options",
    "PodDNSConfigOption": "name value",
    "PodReadinessGate": "conditionType",
    "Affinity": "nodeAffinity podAffinity podAntiAffinity",
    "NodeAffinity": _REQUIRED_AND_PREFERRED,
    "NodeSelector": "nodeSelectorTerms",
    "NodeSelectorTerm": "matchExpressions matchFields",
    "NodeSelectorRequirement": "key operator values",
    "PreferredSchedulingTerm": "weight preference",
    "PodAffinity": _REQUIRED_AND_PREFERRED,
    "PodAntiAffinity": _REQUIRED_AND_PREFERRED,
    "WeightedPodAffinityTerm": "weight podAffinityTerm",
    "PodAffinityTerm": "labelSelector namespaces topologyKey namespaceSelector matchLabelKeys mismatchLabelKeys",
    "TopologySpreadConstraint": "maxSkew topologyKey whenUnsatisfiable labelSelector minDomains nodeAffinityPolicy "
    "nodeTaintsPolicy matchLabelKeys",
    "Volume": "name *VolumeSource",
    "VolumeSource": "hostPath emptyDir 6:secret 10:persistentVolumeClaim 16:downwardAPI 19:configMap 26:projected",
    "HostPathVolumeSource": "path type",
    "EmptyDirVolumeSource": "medium sizeLimit",
    "SecretVolumeSource": "secretName items defaultMode optional",
    "PersistentVolumeClaimVolumeSource": "claimName readOnly",
    "DownwardAPIVolumeSource": "items defaultMode",
    "DownwardAPIVolumeFile": "path fieldRef resourceFieldRef mode",
    "ConfigMapVolumeSource": "*LocalObjectReference items defaultMode optional",
    "ProjectedVolumeSource": "sources defaultMode",
    "VolumeProjection": "secret downwardAPI configMap serviceAccountToken",
    "SecretProjection": "*LocalObjectReference items 4:optional",
    "ConfigMapProjection": "*LocalObjectReference items 4:optional",
    "DownwardAPIProjection": "items",
    "ServiceAccountTokenProjection": "audience expirationSeconds path",
    "KeyToPath": "key path mode",
    "VolumeMount": "name readOnly mountPath subPath mountPropagation subPathExpr recursiveReadOnly",
    "EnvVarSource": "fieldRef resourceFieldRef configMapKeyRef secretKeyRef",
    "ObjectFieldSelector": "apiVersion fieldPath",
    "ResourceFieldSelector": "containerName resource divisor",
    "ConfigMapKeySelector": "*LocalObjectReference key optional",
    "SecretKeySelector": "*LocalObjectReference key optional",
    "EnvFromSource": "prefix configMapRef secretRef",
    "ConfigMapEnvSource": "*LocalObjectReference optional",
    "SecretEnvSource": "*LocalObjectReference optional",
    "Probe": "*ProbeHandler initialDelaySeconds timeoutSeconds periodSeconds successThreshold failureThreshold "
    "terminationGracePeriodSeconds",
    "ProbeHandler": "exec httpGet tcpSocket grpc",
    "Lifecycle": "postStart preStop stopSignal",
    "LifecycleHandler": "exec httpGet tcpSocket sleep",
    "ExecAction": "command",
    "HTTPGetAction": "path port host scheme httpHeaders",
    "HTTPHeader": "name value",
    "TCPSocketAction": "port host",
    "GRPCAction": "port service",
    "SleepAction": "seconds",
    "Container": "name image command args workingDir ports env resources volumeMounts livenessProbe readinessProbe "
    "lifecycle terminationMessagePath imagePullPolicy securityContext stdin stdinOnce tty envFrom "
    "terminationMessagePolicy volumeDevices startupProbe resizePolicy restartPolicy",
    "ContainerPort": "name hostPort containerPort protocol hostIP",
    "EnvVar": "name value valueFrom",
    "ResourceRequirements": "limits requests",
    "Job": _OBJECT,
    "JobSpec": "parallelism completions activeDeadlineSeconds selector manualSelector template backoffLimit "
    "ttlSecondsAfterFinished completionMode suspend",
    "CronJob": _OBJECT,
    "CronJobSpec": "schedule startingDeadlineSeconds concurrencyPolicy suspend jobTemplate successfulJobsHistoryLimit "
    "failedJobsHistoryLimit timeZone",
    "JobTemplateSpec": "metadata spec",
    "Ingress": _OBJECT,
    "IngressSpec": "defaultBackend tls rules ingressClassName",
    "IngressTLS": "hosts secretName",
    "IngressRule": "host *IngressRuleValue",
    "IngressRuleValue": "http",
    "HTTPIngressRuleValue": "paths",
    "HTTPIngressPath": "path backend pathType",
    "IngressBackend": "3:resource service",
    "IngressServiceBackend": "name port",
    "ServiceBackendPort": "name number",
    "PodDisruptionBudget": _OBJECT,
    "PodDisruptionBudgetSpec": "minAvailable selector maxUnavailable unhealthyPodEvictionPolicy",
    "HorizontalPodAutoscaler": _OBJECT,
    "HorizontalPodAutoscalerSpec": "scaleTargetRef minReplicas maxReplicas metrics|targetCPUUtilizationPercentage",
    "CrossVersionObjectReference": "kind name apiVersion",
    "MetricSpec": "type 4:resource",
    "ResourceMetricSource": "name target",
    "MetricTarget": "type value averageValue averageUtilization",
    "Eviction": "metadata deleteOptions",
    "Role": "metadata rules",
    "ClusterRole": "metadata rules aggregationRule",
    "AggregationRule": "clusterRoleSelectors",
    "PolicyRule": "verbs apiGroups resources resourceNames nonResourceURLs",
    "RoleBinding": "metadata subjects roleRef",
    "ClusterRoleBinding": "metadata subjects roleRef",
    "Subject": "kind apiGroup name namespace",
    "RoleRef": "apiGroup kind name",
    "ResourceQuota": _OBJECT,
    "ResourceQuotaSpec": "hard scopes",
    "PriorityClass": "metadata value globalDefault description preemptionPolicy",
    "TokenRequest": _OBJECT,
    "TokenRequestSpec": "audiences 3:boundObjectRef expirationSeconds",
    "BoundObjectReference": "kind apiVersion name uid",
    "SelfSubjectReview": "metadata status",
    "SelfSubjectAccessReview": _OBJECT,
    "SelfSubjectAccessReviewSpec": "resourceAttributes nonResourceAttributes",
    "ResourceAttributes": "namespace verb group version resource subresource name",
    "NonResourceAttributes": "path verb",
    "SelfSubjectRulesReview": _OBJECT,
    "SelfSubjectRulesReviewSpec": "namespace",
}
"""Fields in the order of their numbers; `17:name` jumps to a number, `*Name` is a message whose fields JSON inlines,
`a|b` is the one that the version has."""

_BYTES = frozenset({"Secret.data", "ConfigMap.binaryData"})


def _numbered(text: str) -> dict[int, str]:
    found, number = {}, 0
    for word in text.split():
        jump, _, name = word.rpartition(":")
        number = int(jump) if jump else number + 1
        found[number] = name
    return found


_TABLE = {name: _numbered(text) for name, text in _NUMBERS.items()}


class _Malformed(Exception):
    """The bytes are no protobuf message, or one with unknown fields."""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise _Malformed("a number is cut short")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field; 32- and 64-bit values do not occur in these messages."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise _Malformed("a field is cut short")
            yield tag >> 3, data[at : at + length]
            at += length
        else:
            raise _Malformed(f"wire type {tag & 7}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _text(value: int | bytes) -> str:
    if not isinstance(value, bytes):
        raise _Malformed("a number where a text belongs")
    return value.decode()


def _parts(value: int | bytes) -> dict[int, int | bytes]:
    if not isinstance(value, bytes):
        raise _Malformed("a number where a message belongs")
    return dict(_fields(value))


def _scalar(shape: Shape, value: int | bytes) -> Any:
    match shape:
        case Shape.BOOLEAN:
            return bool(value)
        case Shape.INTEGER if isinstance(value, int):
            return _signed(value)
        case Shape.TIME:
            seconds = _parts(value).get(1)
            return (
                time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_signed(seconds))) if isinstance(seconds, int) else ""
            )
        case Shape.QUANTITY:
            return _text(_parts(value).get(1, b""))
        case Shape.INT_OR_STRING:
            parts = _parts(value)
            number = parts.get(2, 0)
            return _text(parts.get(3, b"")) if parts.get(1) else _signed(number) if isinstance(number, int) else 0
        case Shape.STRING:
            return _text(value)
    raise _Malformed(f"a value of type {shape.value}")


def _struct(node: Node, data: bytes) -> Object:
    return _message(node, node.name.rpartition(".")[2], data)


def _message(node: Node, name: str, data: bytes) -> Object:
    """A message by the numbers of `name`, its fields typed by `node`."""
    table = _TABLE.get(name)
    if table is None:
        raise _Malformed(f"message {name}")
    found: Object = {}
    for number, value in _fields(data):
        key = table.get(number)
        if key is None:
            raise _Malformed(f"field {number} of {name}")
        key = next((one for one in key.split("|") if one in node.fields), key)
        if key == "status":
            # Clients that write protobuf create objects; the server makes their status.
            continue
        if key.startswith("*"):
            found.update(_message(node, key[1:], value if isinstance(value, bytes) else b""))
            continue
        _put(found, key, node.child(key), value, f"{name}.{key}")
    return found


def _put(found: Object, key: str, node: Node, value: int | bytes, path: str) -> None:
    if node.shape is Shape.LIST:
        found.setdefault(key, []).append(_value(node.child(""), value))
    elif node.shape is Shape.MAP:
        parts = _parts(value)
        item = parts.get(2, b"")
        entry = base64.b64encode(item).decode() if path in _BYTES and isinstance(item, bytes) else None
        if entry is None:
            shape = node.child("").shape
            entry = _scalar(
                Shape.QUANTITY if shape is Shape.QUANTITY or path == "ResourceQuotaSpec.hard" else Shape.STRING, item
            )
        found.setdefault(key, {})[_text(parts.get(1, b""))] = entry
    else:
        found[key] = _value(node, value)


def _value(node: Node, value: int | bytes) -> Any:
    if node.shape is not Shape.STRUCT:
        return _scalar(node.shape, value)
    if not isinstance(value, bytes):
        raise _Malformed("a number where a message belongs")
    return _struct(node, value)


_ZERO_IS_ABSENT = frozenset(
    {
        "generation",
        "globalDefault",
        "hostIPC",
        "hostNetwork",
        "hostPID",
        "hostPort",
        "minReadySeconds",
        "nodePort",
        "observedGeneration",
        "paused",
        "publishNotReadyAddresses",
        "stdin",
        "stdinOnce",
        "readOnly",
        "tty",
    }
)
"""Numbers and booleans that are no pointers in Go; for others zero and false mean what they say."""


def _without_empty(value: Any) -> Any:
    """The object as JSON would have it: the encoder writes every field that is no pointer, also when empty."""
    if isinstance(value, dict):
        cleaned = {key: _without_empty(item) for key, item in value.items()}
        return {
            key: item
            for key, item in cleaned.items()
            if item not in ("", {}, []) and (item or key not in _ZERO_IS_ABSENT)
        }
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


_OTHER_MODELS = {
    ("meta.k8s.io", "DeleteOptions"): "meta_v1.DeleteOptions",
    ("policy", "Eviction"): "policy_v1.Eviction",
    ("authentication.k8s.io", "TokenRequest"): "authentication_v1.TokenRequest",
}


def _model(api_version: str, kind: str) -> str:
    group = api_version.rpartition("/")[0]
    found = next((k.model for k in BUILT_IN if (k.api_version, k.kind) == (api_version, kind)), "")
    if kind == "DeleteOptions":
        return "meta_v1.DeleteOptions"
    return found or _OTHER_MODELS.get((group, kind), "")


def decode(body: bytes) -> Object:
    """The object in a protobuf body. Raises ApiError 400."""
    if not body.startswith(MAGIC):
        raise bad_request("the body is not Kubernetes protobuf: it lacks the prefix")
    try:
        envelope = _parts(body[len(MAGIC) :])
        types = _parts(envelope.get(1, b""))
        api_version, kind = _text(types.get(1, b"")), _text(types.get(2, b""))
        model = _model(api_version, kind)
        if not model:
            raise _Malformed(f"kind {kind} of {api_version}")
        raw = envelope.get(2, b"")
        obj = _without_empty(_struct(models.model(model), raw if isinstance(raw, bytes) else b""))
    except (_Malformed, UnicodeDecodeError) as error:
        raise bad_request(f"protobuf body: {error} is not known to this server; send JSON") from error
    return {"apiVersion": api_version, "kind": kind, **obj}
