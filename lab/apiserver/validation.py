"""Rules that an object must keep, each refusal with the field and the sentence that kubectl users know.

https://kubernetes.io/docs/concepts/overview/working-with-objects/names/ gives those of names and labels.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from undermesh.lab.apiserver.errors import Cause, Object
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.selectors import from_label_selector

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_CONFIG_KEY = re.compile(r"[-._a-zA-Z0-9]+")
_LABEL_NAMES = frozenset({"namespaces"})
_PATH_NAMES = frozenset(
    {
        "roles.rbac.authorization.k8s.io",
        "clusterroles.rbac.authorization.k8s.io",
        "rolebindings.rbac.authorization.k8s.io",
        "clusterrolebindings.rbac.authorization.k8s.io",
    }
)

_SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    f"end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{_SUBDOMAIN.pattern}')"
)
_LABEL_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    f"an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '{_LABEL.pattern}')"
)
_DNS_1035_RULE = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    f"and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is "
    f"'{_DNS_1035.pattern}')"
)
_VALUE_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_KEY_RULE = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
    "character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
    "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)


def _spelled(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, separators=(",", ":"))


def invalid_value(field: str, value: Any, why: str) -> Cause:
    return Cause("FieldValueInvalid", f"Invalid value: {_spelled(value)}: {why}", field)


def required(field: str, why: str = "") -> Cause:
    return Cause("FieldValueRequired", f"Required value: {why}" if why else "Required value", field)


def unsupported(field: str, value: Any, supported: Iterable[str]) -> Cause:
    names = ", ".join(f'"{name}"' for name in supported)
    return Cause("FieldValueNotSupported", f"Unsupported value: {_spelled(value)}: supported values: {names}", field)


def duplicate(field: str, value: Any) -> Cause:
    return Cause("FieldValueDuplicate", f"Duplicate value: {_spelled(value)}", field)


def name_problem(resource: str, name: str) -> str:
    """Why `name` cannot name an object of that resource; empty if it can."""
    if resource in _PATH_NAMES:
        if name in (".", ".."):
            return f"may not be '{name}'"
        bad = next((part for part in ("/", "%") if part in name), "")
        return f"may not contain '{bad}'" if bad else ""
    if resource in _LABEL_NAMES:
        rule, text, limit = _LABEL, _LABEL_RULE, 63
    elif resource == "services":
        rule, text, limit = _DNS_1035, _DNS_1035_RULE, 63
    else:
        rule, text, limit = _SUBDOMAIN, _SUBDOMAIN_RULE, 253
    if len(name) > limit:
        return f"must be no more than {limit} bytes"
    return "" if rule.fullmatch(name) else text


def _key_problem(key: str) -> str:
    prefix, slash, name = key.rpartition("/")
    if slash and (not _SUBDOMAIN.fullmatch(prefix) or len(prefix) > 253):
        return f"prefix part {_SUBDOMAIN_RULE}"
    if not name:
        return "name part must be non-empty"
    if len(name) > 63:
        return "name part must be no more than 63 bytes"
    return "" if _QUALIFIED.fullmatch(name) else _KEY_RULE


def labels(found: dict[str, str], field: str) -> list[Cause]:
    """The rules of label keys and values."""
    causes = []
    for key, value in found.items():
        problem = _key_problem(key)
        if problem:
            causes.append(invalid_value(field, key, problem))
        if len(value) > 63:
            causes.append(invalid_value(field, value, "must be no more than 63 bytes"))
        elif value and not _QUALIFIED.fullmatch(value):
            causes.append(invalid_value(field, value, _VALUE_RULE))
    return causes


def metadata(kind: Kind, obj: Object) -> list[Cause]:
    """The rules of metadata, the same for every kind but for the form of names."""
    found = obj["metadata"]
    causes = []
    name = found.get("name", "")
    if not name:
        causes.append(required("metadata.name", "name or generateName is required"))
    else:
        problem = name_problem(kind.resource, name)
        if problem:
            causes.append(invalid_value("metadata.name", name, problem))
    causes += labels(found.get("labels") or {}, "metadata.labels")
    for key in found.get("annotations") or {}:
        problem = _key_problem(key.lower())
        if problem:
            causes.append(invalid_value("metadata.annotations", key, problem))
    for index, owner in enumerate(found.get("ownerReferences") or ()):
        for part in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(part):
                causes.append(
                    invalid_value(f"metadata.ownerReferences[{index}].{part}", "", f"{part} must not be empty")
                )
    return causes


def _port_number(field: str, value: Any) -> list[Cause]:
    if isinstance(value, int) and not 1 <= value <= 65535:
        return [invalid_value(field, value, "must be between 1 and 65535, inclusive")]
    return []


def _one_of(obj: Object, key: str, field: str, allowed: tuple[str, ...]) -> list[Cause]:
    value = obj.get(key)
    return [unsupported(f"{field}.{key}", value, allowed)] if value is not None and value not in allowed else []


def _containers(spec: Object, field: str) -> list[Cause]:
    causes: list[Cause] = []
    volumes = {volume.get("name") for volume in spec.get("volumes") or ()}
    if not spec.get("containers"):
        causes.append(required(f"{field}.containers"))
    seen: set[str] = set()
    for group in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(group) or ()):
            at = f"{field}.{group}[{index}]"
            name = container.get("name", "")
            if not name:
                causes.append(required(f"{at}.name"))
            elif not _LABEL.fullmatch(name) or len(name) > 63:
                causes.append(invalid_value(f"{at}.name", name, _LABEL_RULE))
            elif name in seen:
                causes.append(duplicate(f"{at}.name", name))
            seen.add(name)
            if not container.get("image"):
                causes.append(required(f"{at}.image"))
            causes += _one_of(container, "imagePullPolicy", at, ("Always", "IfNotPresent", "Never"))
            for number, mount in enumerate(container.get("volumeMounts") or ()):
                if mount.get("name") not in volumes:
                    text = f'Not found: "{mount.get("name", "")}"'
                    causes.append(Cause("FieldValueNotFound", text, f"{at}.volumeMounts[{number}].name"))
            for number, port in enumerate(container.get("ports") or ()):
                if "containerPort" not in port:
                    causes.append(required(f"{at}.ports[{number}].containerPort"))
                causes += _port_number(f"{at}.ports[{number}].containerPort", port.get("containerPort"))
                causes += _one_of(port, "protocol", f"{at}.ports[{number}]", ("SCTP", "TCP", "UDP"))
            for number, variable in enumerate(container.get("env") or ()):
                if not variable.get("name"):
                    causes.append(required(f"{at}.env[{number}].name"))
    return causes


def pod_spec(spec: Object, field: str) -> list[Cause]:
    """The rules of a pod's spec, in a pod or a template."""
    causes = _containers(spec, field)
    seen: set[str] = set()
    for index, volume in enumerate(spec.get("volumes") or ()):
        name = volume.get("name", "")
        if not name:
            causes.append(required(f"{field}.volumes[{index}].name"))
        elif name in seen:
            causes.append(duplicate(f"{field}.volumes[{index}].name", name))
        seen.add(name)
        if len(volume) > 2:
            causes.append(
                Cause(
                    "FieldValueForbidden",
                    "Forbidden: may not specify more than 1 volume type",
                    f"{field}.volumes[{index}]",
                )
            )
    causes += _one_of(spec, "restartPolicy", field, ("Always", "OnFailure", "Never"))
    causes += _one_of(spec, "dnsPolicy", field, ("ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"))
    causes += labels(spec.get("nodeSelector") or {}, f"{field}.nodeSelector")
    return causes


_MUTABLE_IN_POD = (
    "activeDeadlineSeconds",
    "terminationGracePeriodSeconds",
    "tolerations",
    "schedulingGates",
    "ephemeralContainers",
    "nodeName",
)


def _fixed_pod_parts(spec: Object) -> Object:
    found = {key: value for key, value in spec.items() if key not in _MUTABLE_IN_POD}
    for group in ("containers", "initContainers"):
        found[group] = [
            {key: value for key, value in container.items() if key not in ("image", "resources")}
            for container in spec.get(group) or ()
        ]
    return found


def _pod(obj: Object, old: Object | None) -> list[Cause]:
    causes = pod_spec(obj.get("spec") or {}, "spec")
    if old is not None and _fixed_pod_parts(old["spec"]) != _fixed_pod_parts(obj["spec"]):
        text = (
            "Forbidden: pod updates may not change fields other than `spec.containers[*].image`,"
            "`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to "
            "existing "
            "tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
        )
        causes.append(Cause("FieldValueForbidden", text, "spec"))
    return causes


def _workload(obj: Object, old: Object | None) -> list[Cause]:
    spec = obj.get("spec") or {}
    causes: list[Cause] = []
    selector = spec.get("selector")
    template = spec.get("template") or {}
    if not selector:
        causes.append(required("spec.selector"))
    else:
        found = (template.get("metadata") or {}).get("labels") or {}
        try:
            matches = all(requirement.matches(found) for requirement in from_label_selector(selector))
        except KeyError as error:
            causes.append(invalid_value("spec.selector", selector, f"unknown operator or missing {error}"))
            matches = True
        if not matches:
            causes.append(
                invalid_value("spec.template.metadata.labels", found, "`selector` does not match template `labels`")
            )
    if isinstance(spec.get("replicas"), int) and spec["replicas"] < 0:
        causes.append(invalid_value("spec.replicas", spec["replicas"], "must be greater than or equal to 0"))
    causes += labels(((template.get("metadata") or {}).get("labels")) or {}, "spec.template.metadata.labels")
    causes += pod_spec(template.get("spec") or {}, "spec.template.spec")
    if (template.get("spec") or {}).get("restartPolicy", "Always") != "Always":
        causes.append(unsupported("spec.template.spec.restartPolicy", template["spec"]["restartPolicy"], ("Always",)))
    if old is not None and old["spec"].get("selector") != selector:
        causes.append(invalid_value("spec.selector", selector, "field is immutable"))
    return causes


def _job(obj: Object, old: Object | None) -> list[Cause]:
    spec = obj.get("spec") or {}
    causes = pod_spec((spec.get("template") or {}).get("spec") or {}, "spec.template.spec")
    policy = ((spec.get("template") or {}).get("spec") or {}).get("restartPolicy", "")
    if policy not in ("OnFailure", "Never"):
        text = 'Required value: valid values: "OnFailure", "Never"'
        causes.append(Cause("FieldValueRequired", text, "spec.template.spec.restartPolicy"))
    if old is not None:
        for key in ("selector", "template", "completionMode"):
            if old["spec"].get(key) != spec.get(key):
                causes.append(invalid_value(f"spec.{key}", spec.get(key), "field is immutable"))
    return causes


def _cron_job(obj: Object, old: Object | None) -> list[Cause]:
    schedule = (obj.get("spec") or {}).get("schedule", "")
    if not schedule:
        return [required("spec.schedule")]
    if not schedule.startswith("@") and len(schedule.split()) != 5:
        return [
            invalid_value(
                "spec.schedule",
                schedule,
                f"expected exactly 5 fields, found {len(schedule.split())}: {schedule.split()}",
            )
        ]
    return []


def _service(obj: Object, old: Object | None) -> list[Cause]:
    spec = obj.get("spec") or {}
    causes: list[Cause] = []
    kind = spec.get("type", "ClusterIP")
    causes += _one_of(spec, "type", "spec", ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort"))
    ports = spec.get("ports") or []
    if not ports and kind != "ExternalName" and spec.get("clusterIP") != "None":
        causes.append(required("spec.ports"))
    seen: set[Any] = set()
    for index, port in enumerate(ports):
        at = f"spec.ports[{index}]"
        name = port.get("name", "")
        if not name and len(ports) > 1:
            causes.append(required(f"{at}.name"))
        elif name and name in seen:
            causes.append(duplicate(f"{at}.name", name))
        elif name and not _LABEL.fullmatch(name):
            causes.append(invalid_value(f"{at}.name", name, _LABEL_RULE))
        seen.add(name)
        if "port" not in port:
            causes.append(required(f"{at}.port"))
        causes += _port_number(f"{at}.port", port.get("port")) + _port_number(
            f"{at}.targetPort", port.get("targetPort")
        )
        causes += _one_of(port, "protocol", at, ("SCTP", "TCP", "UDP"))
    for index, address in enumerate(spec.get("clusterIPs") or ()):
        if address not in ("None", ""):
            causes += _address(f"spec.clusterIPs[{index}]", address)
    if kind == "ExternalName" and not spec.get("externalName"):
        causes.append(required("spec.externalName"))
    before = (old or {}).get("spec", {}).get("clusterIP")
    if before and kind != "ExternalName" and spec.get("clusterIP") != before:
        causes.append(invalid_value("spec.clusterIPs[0]", spec.get("clusterIPs"), "may not change once set"))
    return causes + labels(spec.get("selector") or {}, "spec.selector")


def _address(field: str, value: str) -> list[Cause]:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return [invalid_value(field, value, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)")]
    return []


def _data_keys(obj: Object, old: Object | None) -> list[Cause]:
    causes = []
    for part in ("data", "binaryData"):
        for key in obj.get(part) or {}:
            if not _CONFIG_KEY.fullmatch(key) or len(key) > 253:
                causes.append(
                    invalid_value(
                        f"{part}[{key}]",
                        key,
                        "a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
                    )
                )
    changed = old is not None and (obj.get("data") != old.get("data") or not obj.get("immutable"))
    if old is not None and old.get("immutable") and changed:
        causes.append(Cause("FieldValueForbidden", "Forbidden: field is immutable when `immutable` is set", "data"))
    return causes


def _secret(obj: Object, old: Object | None) -> list[Cause]:
    causes = _data_keys(obj, old)
    if old is not None and old.get("type") != obj.get("type"):
        causes.append(invalid_value("type", obj.get("type"), "field is immutable"))
    return causes


def _role_binding(obj: Object, old: Object | None) -> list[Cause]:
    role = obj.get("roleRef") or {}
    causes = []
    if not role.get("name"):
        causes.append(required("roleRef.name"))
    causes += _one_of(role, "kind", "roleRef", ("Role", "ClusterRole"))
    if old is not None and old.get("roleRef") != role:
        causes.append(invalid_value("roleRef", role, "cannot change roleRef"))
    return causes


def _endpoint_slice(obj: Object, old: Object | None) -> list[Cause]:
    causes = []
    if not obj.get("addressType"):
        causes.append(required("addressType"))
    causes += [
        unsupported("addressType", obj["addressType"], ("IPv4", "IPv6", "FQDN"))
        for _ in range(1)
        if obj.get("addressType", "IPv4") not in ("IPv4", "IPv6", "FQDN")
    ]
    for index, endpoint in enumerate(obj.get("endpoints") or ()):
        if not endpoint.get("addresses"):
            causes.append(required(f"endpoints[{index}].addresses", "must contain at least 1 address"))
    if old is not None and old.get("addressType") != obj.get("addressType"):
        causes.append(invalid_value("addressType", obj.get("addressType"), "field is immutable"))
    return causes


def _lease(obj: Object, old: Object | None) -> list[Cause]:
    seconds = (obj.get("spec") or {}).get("leaseDurationSeconds")
    return (
        [invalid_value("spec.leaseDurationSeconds", seconds, "must be greater than 0")]
        if seconds is not None and seconds <= 0
        else []
    )


Rule = Callable[[Object, Object | None], list[Cause]]
RULES: dict[str, Rule] = {
    "pods": _pod,
    "services": _service,
    "configmaps": _data_keys,
    "secrets": _secret,
    "deployments.apps": _workload,
    "replicasets.apps": _workload,
    "daemonsets.apps": _workload,
    "statefulsets.apps": _workload,
    "jobs.batch": _job,
    "cronjobs.batch": _cron_job,
    "rolebindings.rbac.authorization.k8s.io": _role_binding,
    "clusterrolebindings.rbac.authorization.k8s.io": _role_binding,
    "endpointslices.discovery.k8s.io": _endpoint_slice,
    "leases.coordination.k8s.io": _lease,
}


def validate(kind: Kind, obj: Object, old: Object | None) -> list[Cause]:
    """What is wrong with `obj`, about to be created (`old` None) or to replace `old`."""
    causes = metadata(kind, obj)
    rule = RULES.get(kind.resource)
    if rule is not None:
        causes += rule(obj, old)
    return causes
