"""Discovery documents: which groups, versions and kinds there are, in the old form and aggregated.

https://kubernetes.io/docs/concepts/overview/kubernetes-api/#discovery-api
"""

from __future__ import annotations

import base64
import hashlib

from undermesh.lab.apiserver.catalog import Catalog, group_order
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.kinds import SUBRESOURCES, Kind

AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
VERSION = "v1.37.1"
"""What /version says: the API that the built-in kinds follow."""


def version() -> Object:
    return {
        "major": "1",
        "minor": "37",
        "emulationMajor": "1",
        "emulationMinor": "37",
        "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "36",
        "gitVersion": VERSION,
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "python",
        "platform": "linux/amd64",
    }


def api_versions(address: str) -> Object:
    """/api"""
    return {
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}],
    }


def _entry(kind: Kind, subresource: str) -> Object:
    """One line of an APIResourceList; the kind itself when `subresource` is empty."""
    if not subresource:
        entry: Object = {
            "name": kind.plural,
            "singularName": kind.singular_name,
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": list(kind.verbs),
        }
        if kind.short_names:
            entry["shortNames"] = list(kind.short_names)
        if kind.categories:
            entry["categories"] = list(kind.categories)
        if not kind.virtual:
            digest = hashlib.sha256(f"{kind.resource}/{kind.kind}".encode()).digest()
            entry["storageVersionHash"] = base64.b64encode(digest[:8]).decode()
        return entry
    found = SUBRESOURCES[subresource]
    entry = {
        "name": f"{kind.plural}/{subresource}",
        "singularName": "",
        "namespaced": kind.namespaced,
        "kind": found.kind or kind.kind,
        "verbs": list(found.verbs),
    }
    if found.group:
        entry["group"], entry["version"] = found.group, found.version
    return entry


def resource_list(catalog: Catalog, group: str, version: str) -> Object:
    """/api/v1 or /apis/GROUP/VERSION"""
    entries = []
    for kind in catalog.kinds(group, version):
        entries += [_entry(kind, sub) for sub in ("", *sorted(kind.subresources))]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{group}/{version}" if group else version,
        "resources": entries,
    }


def group(name: str, versions: list[str]) -> Object:
    """/apis/GROUP"""
    found = [{"groupVersion": f"{name}/{item}", "version": item} for item in versions]
    return {"kind": "APIGroup", "apiVersion": "v1", "name": name, "versions": found, "preferredVersion": found[0]}


def group_list(catalog: Catalog) -> Object:
    """/apis"""
    groups = catalog.groups()
    names = [name for name in group_order(groups) if name]
    items = []
    for name in names:
        item = group(name, groups[name])
        del item["kind"], item["apiVersion"]
        items.append(item)
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": items}


def _aggregated_kind(kind: Kind) -> Object:
    entry: Object = {
        "resource": kind.plural,
        "responseKind": {"group": kind.group, "version": kind.version, "kind": kind.kind},
        "scope": "Namespaced" if kind.namespaced else "Cluster",
        "singularResource": kind.singular_name,
        "verbs": list(kind.verbs),
    }
    if kind.short_names:
        entry["shortNames"] = list(kind.short_names)
    if kind.categories:
        entry["categories"] = list(kind.categories)
    if kind.subresources:
        entry["subresources"] = [_aggregated_subresource(kind, name) for name in sorted(kind.subresources)]
    return entry


def _aggregated_subresource(kind: Kind, name: str) -> Object:
    found = SUBRESOURCES[name]
    response = {
        "group": found.group if found.kind else kind.group,
        "version": found.version if found.kind else kind.version,
        "kind": found.kind or kind.kind,
    }
    return {"subresource": name, "responseKind": response, "verbs": list(found.verbs)}


def aggregated(catalog: Catalog, *, core: bool) -> Object:
    """/api or /apis when a client accepts the aggregated form."""
    groups = catalog.groups()
    names = [""] if core else [name for name in group_order(groups) if name]
    items = []
    for name in names:
        versions = [
            {
                "version": item,
                "freshness": "Current",
                "resources": [_aggregated_kind(kind) for kind in catalog.kinds(name, item)],
            }
            for item in groups[name]
        ]
        items.append({"metadata": {"name": name, "creationTimestamp": None}, "versions": versions})
    return {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items}
