"""What `kubectl get` shows of each built-in kind: columns and how a row's cells come from the object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from undermesh.lab.apiserver.ages import age, duration
from undermesh.lab.apiserver.clock import seconds_since
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.podrow import pod_row

NONE = "<none>"


@dataclass(frozen=True)
class Column:
    """One column; priority 1 is shown by -o wide only."""

    name: str
    type: str = "string"
    priority: int = 0


@dataclass(frozen=True)
class Printer:
    columns: tuple[Column, ...]
    cells: Callable[[Object], list[Any]]


def _columns(text: str) -> tuple[Column, ...]:
    """`Name|Data:integer|Age|Labels+`: a type after a colon, + for wide only."""
    found = []
    for part in text.split("|"):
        name, _, kind = part.rstrip("+").partition(":")
        found.append(Column(name, kind or "string", int(part.endswith("+"))))
    return tuple(found)


def _printer(text: str, cells: Callable[[Object], list[Any]]) -> Printer:
    return Printer(_columns(text), cells)


def _name(obj: Object) -> str:
    return str(obj["metadata"]["name"])


def _age(obj: Object) -> str:
    return age(obj["metadata"].get("creationTimestamp"))


def _selector(selector: Object | None) -> str:
    """A LabelSelector, or a plain map, as a label query."""
    if not selector:
        return NONE
    if "matchLabels" not in selector and "matchExpressions" not in selector:
        return ",".join(f"{key}={value}" for key, value in sorted(selector.items()))
    parts = [f"{key}={value}" for key, value in sorted((selector.get("matchLabels") or {}).items())]
    for term in selector.get("matchExpressions") or ():
        values = ",".join(term.get("values") or ())
        match term["operator"]:
            case "In":
                parts.append(f"{term['key']} in ({values})")
            case "NotIn":
                parts.append(f"{term['key']} notin ({values})")
            case "Exists":
                parts.append(term["key"])
            case _:
                parts.append(f"!{term['key']}")
    return ",".join(parts)


def _template(spec: Object) -> tuple[str, str]:
    containers = ((spec.get("template") or {}).get("spec") or {}).get("containers") or ()
    return ",".join(c.get("name", "") for c in containers), ",".join(c.get("image", "") for c in containers)


def _namespace(obj: Object) -> list[Any]:
    return [_name(obj), (obj.get("status") or {}).get("phase", ""), _age(obj)]


def _node(obj: Object) -> list[Any]:
    metadata, spec, status = obj["metadata"], obj.get("spec") or {}, obj.get("status") or {}
    ready = next((c["status"] for c in status.get("conditions") or () if c["type"] == "Ready"), None)
    state = "Unknown" if ready is None else "Ready" if ready == "True" else "NotReady"
    if spec.get("unschedulable"):
        state += ",SchedulingDisabled"
    prefix = "node-role.kubernetes.io/"
    roles = sorted(key.removeprefix(prefix) for key in metadata.get("labels") or {} if key.startswith(prefix))
    info = status.get("nodeInfo") or {}
    addresses = {a["type"]: a["address"] for a in reversed(status.get("addresses") or ())}
    return [
        _name(obj),
        state,
        ",".join(roles) or NONE,
        _age(obj),
        info.get("kubeletVersion", ""),
        addresses.get("InternalIP", NONE),
        addresses.get("ExternalIP", NONE),
        info.get("osImage") or "<unknown>",
        info.get("kernelVersion") or "<unknown>",
        info.get("containerRuntimeVersion") or "<unknown>",
    ]


def _service(obj: Object) -> list[Any]:
    spec, status = obj["spec"], obj.get("status") or {}
    kind = spec.get("type", "ClusterIP")
    balancer = [i.get("ip") or i.get("hostname", "") for i in (status.get("loadBalancer") or {}).get("ingress") or ()]
    external = ",".join([*balancer, *(spec.get("externalIPs") or ())])
    if kind == "ExternalName":
        external = spec.get("externalName", "")
    elif not external:
        external = "<pending>" if kind == "LoadBalancer" else NONE
    ports = []
    for port in spec.get("ports") or ():
        node = f":{port['nodePort']}" if port.get("nodePort") else ""
        ports.append(f"{port['port']}{node}/{port.get('protocol', 'TCP')}")
    return [
        _name(obj),
        kind,
        spec.get("clusterIP") or NONE,
        external,
        ",".join(ports) or NONE,
        _age(obj),
        _selector(spec.get("selector")),
    ]


def _endpoints(obj: Object) -> list[Any]:
    found = []
    for subset in obj.get("subsets") or ():
        for port in subset.get("ports") or ():
            found += [f"{_joined(address['ip'], port['port'])}" for address in subset.get("addresses") or ()]
    more = f" + {len(found) - 3} more..." if len(found) > 3 else ""
    return [_name(obj), ",".join(found[:3]) + more or NONE, _age(obj)]


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _limited(items: list[str], limit: int, empty: str) -> str:
    if not items:
        return empty
    more = f" + {len(items) - limit} more..." if len(items) > limit else ""
    return ",".join(items[:limit]) + more


def _endpoint_slice(obj: Object) -> list[Any]:
    ports = [str(port["port"]) if port.get("port") is not None else "*" for port in obj.get("ports") or ()]
    addresses = [address for endpoint in obj.get("endpoints") or () for address in endpoint.get("addresses") or ()]
    return [
        _name(obj),
        obj.get("addressType", ""),
        _limited(ports, 3, "<unset>"),
        _limited(addresses, 3, "<unset>"),
        _age(obj),
    ]


def _deployment(obj: Object) -> list[Any]:
    spec, status = obj["spec"], obj.get("status") or {}
    names, images = _template(spec)
    return [
        _name(obj),
        f"{status.get('readyReplicas', 0)}/{spec.get('replicas', 1)}",
        status.get("updatedReplicas", 0),
        status.get("availableReplicas", 0),
        _age(obj),
        names,
        images,
        _selector(spec.get("selector")),
    ]


def _replica_set(obj: Object) -> list[Any]:
    spec, status = obj["spec"], obj.get("status") or {}
    names, images = _template(spec)
    return [
        _name(obj),
        spec.get("replicas", 1),
        status.get("replicas", 0),
        status.get("readyReplicas", 0),
        _age(obj),
        names,
        images,
        _selector(spec.get("selector")),
    ]


def _daemon_set(obj: Object) -> list[Any]:
    spec, status = obj["spec"], obj.get("status") or {}
    names, images = _template(spec)
    nodes = ((spec.get("template") or {}).get("spec") or {}).get("nodeSelector")
    return [
        _name(obj),
        status.get("desiredNumberScheduled", 0),
        status.get("currentNumberScheduled", 0),
        status.get("numberReady", 0),
        status.get("updatedNumberScheduled", 0),
        status.get("numberAvailable", 0),
        _selector(nodes),
        _age(obj),
        names,
        images,
        _selector(spec.get("selector")),
    ]


def _stateful_set(obj: Object) -> list[Any]:
    spec, status = obj["spec"], obj.get("status") or {}
    return [_name(obj), f"{status.get('readyReplicas', 0)}/{spec.get('replicas', 1)}", _age(obj), *_template(spec)]


def _job(obj: Object) -> list[Any]:
    spec, status = obj["spec"], obj.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or () if c.get("status") == "True"}
    state = next(
        (
            word
            for key, word in (
                ("Complete", "Complete"),
                ("Failed", "Failed"),
                ("Suspended", "Suspended"),
                ("FailureTarget", "FailureTarget"),
                ("SuccessCriteriaMet", "SuccessCriteriaMet"),
            )
            if key in conditions
        ),
        "Terminating" if obj["metadata"].get("deletionTimestamp") else "Running",
    )
    wanted = spec.get("completions")
    done = (
        f"{status.get('succeeded', 0)}/{wanted}"
        if wanted is not None
        else f"{status.get('succeeded', 0)}/1 of {spec.get('parallelism', 1)}"
    )
    took = ""
    if status.get("startTime"):
        end = seconds_since(status["completionTime"]) if status.get("completionTime") else 0.0
        took = duration(seconds_since(status["startTime"]) - end)
    names, images = _template(spec)
    return [_name(obj), state, done, took, _age(obj), names, images, _selector(spec.get("selector"))]


def _cron_job(obj: Object) -> list[Any]:
    spec, status = obj["spec"], obj.get("status") or {}
    last = age(status["lastScheduleTime"]) if status.get("lastScheduleTime") else NONE
    names, images = _template((spec.get("jobTemplate") or {}).get("spec") or {})
    return [
        _name(obj),
        spec.get("schedule", ""),
        spec.get("timeZone") or NONE,
        "True" if spec.get("suspend") else "False",
        len(status.get("active") or ()),
        last,
        _age(obj),
        names,
        images,
        _selector(((spec.get("jobTemplate") or {}).get("spec") or {}).get("selector")),
    ]


def _event(obj: Object) -> list[Any]:
    about = obj.get("involvedObject") or {}
    target = f"{about.get('kind', '').lower()}/{about.get('name', '')}"
    first = obj.get("firstTimestamp") or obj.get("eventTime")
    series = obj.get("series") or {}
    last = series.get("lastObservedTime") or obj.get("lastTimestamp") or first
    count = series.get("count") or obj.get("count") or 1
    source = obj.get("source") or {}
    component = source.get("component") or obj.get("reportingComponent", "")
    host = source.get("host") or obj.get("reportingInstance", "")
    return [
        age(last),
        obj.get("type", ""),
        obj.get("reason", ""),
        target,
        about.get("fieldPath", ""),
        ", ".join(part for part in (component, host) if part),
        (obj.get("message") or "").strip(),
        age(first),
        count,
        _name(obj),
    ]


def _lease(obj: Object) -> list[Any]:
    return [_name(obj), (obj.get("spec") or {}).get("holderIdentity", ""), _age(obj)]


def _network_policy(obj: Object) -> list[Any]:
    return [_name(obj), _selector((obj.get("spec") or {}).get("podSelector")), _age(obj)]


def _ingress(obj: Object) -> list[Any]:
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    hosts = [rule["host"] for rule in spec.get("rules") or () if rule.get("host")]
    balancer = [i.get("ip") or i.get("hostname", "") for i in (status.get("loadBalancer") or {}).get("ingress") or ()]
    return [
        _name(obj),
        spec.get("ingressClassName") or NONE,
        _limited(hosts, 3, "*"),
        ",".join(balancer),
        "80, 443" if spec.get("tls") else "80",
        _age(obj),
    ]


def _budget(obj: Object) -> list[Any]:
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    return [
        _name(obj),
        str(spec.get("minAvailable", "N/A")),
        str(spec.get("maxUnavailable", "N/A")),
        status.get("disruptionsAllowed", 0),
        _age(obj),
    ]


def _quota(obj: Object) -> list[Any]:
    status = obj.get("status") or {}
    hard, used = status.get("hard") or {}, status.get("used") or {}
    words = {name: f"{name}: {used.get(name, '0')}/{value}" for name, value in sorted(hard.items())}
    limits = ", ".join(text for name, text in words.items() if name.startswith("limits"))
    return [
        _name(obj),
        ", ".join(text for name, text in words.items() if not name.startswith("limits")),
        limits,
        _age(obj),
    ]


def _target(metric: Object) -> str:
    """A target of an autoscaler, whose current value is never known: there is no metrics server."""
    resource = metric.get("resource") or {}
    target = resource.get("target") or {}
    percent = f"{target['averageUtilization']}%" if "averageUtilization" in target else ""
    wanted = percent or target.get("averageValue") or target.get("value")
    return f"{resource['name']}: <unknown>/{wanted}" if resource.get("name") and wanted else "<unknown>"


def _hpa(obj: Object) -> list[Any]:
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    target = spec.get("scaleTargetRef") or {}
    return [
        _name(obj),
        f"{target.get('kind')}/{target.get('name')}",
        ", ".join(_target(metric) for metric in spec.get("metrics") or ()) or NONE,
        str(spec.get("minReplicas", "<unset>")),
        spec.get("maxReplicas", 0),
        status.get("currentReplicas", 0),
        _age(obj),
    ]


def _role_binding(obj: Object) -> list[Any]:
    role, subjects = obj.get("roleRef") or {}, obj.get("subjects") or ()
    users = [s["name"] for s in subjects if s.get("kind") == "User"]
    groups = [s["name"] for s in subjects if s.get("kind") == "Group"]
    accounts = [f"{s.get('namespace', '')}/{s['name']}" for s in subjects if s.get("kind") == "ServiceAccount"]
    return [
        _name(obj),
        f"{role.get('kind')}/{role.get('name')}",
        _age(obj),
        ", ".join(users),
        ", ".join(groups),
        ", ".join(accounts),
    ]


def _created(obj: Object) -> list[Any]:
    return [_name(obj), obj["metadata"].get("creationTimestamp", "")]


def _claim(obj: Object) -> list[Any]:
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    modes = {"ReadWriteOnce": "RWO", "ReadOnlyMany": "ROX", "ReadWriteMany": "RWX", "ReadWriteOncePod": "RWOP"}
    access = ",".join(modes.get(mode, mode) for mode in status.get("accessModes") or ())
    return [
        _name(obj),
        status.get("phase", ""),
        spec.get("volumeName", ""),
        (status.get("capacity") or {}).get("storage", ""),
        access,
        spec.get("storageClassName", ""),
        "<unset>",
        _age(obj),
        spec.get("volumeMode", "<unset>"),
    ]


def _storage_class(obj: Object) -> list[Any]:
    return [
        _name(obj),
        obj.get("provisioner", ""),
        obj.get("reclaimPolicy", "Delete"),
        obj.get("volumeBindingMode", "Immediate"),
        bool(obj.get("allowVolumeExpansion")),
        _age(obj),
    ]


_SET = "Name|Desired:integer|Current:integer|Ready:integer|Age|Containers+|Images+|Selector+"
_POD = "Name|Ready|Status|Restarts|Age|IP+|Node+|Nominated Node+|Readiness Gates+"
PRINTERS: dict[str, Printer] = {
    "pods": _printer(_POD, pod_row),
    "namespaces": _printer("Name|Status|Age", _namespace),
    "nodes": _printer(
        "Name|Status|Roles|Age|Version|Internal-IP+|External-IP+|OS-Image+|Kernel-Version+|Container-Runtime+", _node
    ),
    "services": _printer("Name|Type|Cluster-IP|External-IP|Port(s)|Age|Selector+", _service),
    "endpoints": _printer("Name|Endpoints|Age", _endpoints),
    "endpointslices.discovery.k8s.io": _printer("Name|AddressType|Ports|Endpoints|Age", _endpoint_slice),
    "configmaps": _printer(
        "Name|Data|Age", lambda o: [_name(o), len(o.get("data") or {}) + len(o.get("binaryData") or {}), _age(o)]
    ),
    "secrets": _printer(
        "Name|Type|Data:integer|Age", lambda o: [_name(o), o.get("type", ""), len(o.get("data") or {}), _age(o)]
    ),
    "resourcequotas": _printer("Name|Request|Limit|Age", _quota),
    "limitranges": _printer("Name|Created At", _created),
    "serviceaccounts": _printer("Name|Age", lambda o: [_name(o), _age(o)]),
    "events": _printer(
        "Last Seen|Type|Reason|Object|Subobject+|Source+|Message|First Seen+|Count:integer+|Name+", _event
    ),
    "replicationcontrollers": _printer(_SET, _replica_set),
    "persistentvolumeclaims": _printer(
        "Name|Status|Volume|Capacity|Access Modes|StorageClass|VolumeAttributesClass|Age|VolumeMode+", _claim
    ),
    "deployments.apps": _printer(
        "Name|Ready|Up-to-date:integer|Available:integer|Age|Containers+|Images+|Selector+", _deployment
    ),
    "replicasets.apps": _printer(_SET, _replica_set),
    "daemonsets.apps": _printer(
        "Name|Desired:integer|Current:integer|Ready:integer|Up-to-date:integer|Available:integer|Node Selector|Age"
        "|Containers+|Images+|Selector+",
        _daemon_set,
    ),
    "statefulsets.apps": _printer("Name|Ready|Age|Containers+|Images+", _stateful_set),
    "jobs.batch": _printer("Name|Status|Completions|Duration|Age|Containers+|Images+|Selector+", _job),
    "cronjobs.batch": _printer(
        "Name|Schedule|Timezone|Suspend|Active:integer|Last Schedule|Age|Containers+|Images+|Selector+", _cron_job
    ),
    "leases.coordination.k8s.io": _printer("Name|Holder|Age", _lease),
    "networkpolicies.networking.k8s.io": _printer("Name|Pod-Selector|Age", _network_policy),
    "ingresses.networking.k8s.io": _printer("Name|Class|Hosts|Address|Ports|Age", _ingress),
    "poddisruptionbudgets.policy": _printer(
        "Name|Min Available|Max Unavailable|Allowed Disruptions:integer|Age", _budget
    ),
    "horizontalpodautoscalers.autoscaling": _printer(
        "Name|Reference|Targets|MinPods|MaxPods:integer|Replicas:integer|Age", _hpa
    ),
    "roles.rbac.authorization.k8s.io": _printer("Name|Created At", _created),
    "clusterroles.rbac.authorization.k8s.io": _printer("Name|Created At", _created),
    "rolebindings.rbac.authorization.k8s.io": _printer("Name|Role|Age|Users+|Groups+|ServiceAccounts+", _role_binding),
    "clusterrolebindings.rbac.authorization.k8s.io": _printer(
        "Name|Role|Age|Users+|Groups+|ServiceAccounts+", _role_binding
    ),
    "storageclasses.storage.k8s.io": _printer(
        "Name|Provisioner|ReclaimPolicy|VolumeBindingMode|AllowVolumeExpansion|Age", _storage_class
    ),
    "priorityclasses.scheduling.k8s.io": _printer(
        "Name|Value:integer|Global-Default:boolean|Age",
        lambda o: [_name(o), o.get("value", 0), bool(o.get("globalDefault")), _age(o)],
    ),
    "customresourcedefinitions.apiextensions.k8s.io": _printer("Name|Created At", _created),
}
DEFAULT = _printer("Name|Age", lambda obj: [_name(obj), _age(obj)])
"""For kinds that the table does not name."""
