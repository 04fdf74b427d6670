"""The lab's API server in this process, and an administrator's hands on it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import yaml
from source_harness import FAST

from undermesh.api.kubernetes import errors
from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.api import MERGE_PATCH, Api
from undermesh.lab.apiserver.server import ApiServer, Settings

SYSTEM = "undermesh-system"
AGENT = "undermesh-agent"


def definition(kind: str, plural: str, group: str) -> dict[str, Any]:
    """A kind of Istio's that takes any spec."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": anything, "status": anything}}},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"},
            "versions": [version],
        },
    }


DEFINITIONS = (
    definition("AuthorizationPolicy", "authorizationpolicies", "security.istio.io"),
    definition("PeerAuthentication", "peerauthentications", "security.istio.io"),
    definition("ServiceEntry", "serviceentries", "networking.istio.io"),
    definition("WorkloadEntry", "workloadentries", "networking.istio.io"),
)


class Cluster:
    def __init__(self, server: ApiServer, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.kubeconfig = directory / "admin.kubeconfig"
        self.kubeconfig.write_text(server.admin_kubeconfig())
        self.api = Api(Access(self.kubeconfig), FAST)

    async def create(self, path: str, obj: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.api.request("POST", path, body=obj))
        return found

    async def get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.api.request("GET", path))
        return found

    async def patch(self, path: str, change: dict[str, Any]) -> None:
        await self.api.request("PATCH", path, body=change, content_type=MERGE_PATCH)

    async def delete(self, path: str) -> None:
        await self.api.request("DELETE", path, body={"gracePeriodSeconds": 0})

    async def define_kinds(self) -> None:
        """Install the kinds of Istio's that are read."""
        for one in DEFINITIONS:
            await self.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", one)

    async def namespace(self, name: str) -> None:
        await self.create("/api/v1/namespaces", {"metadata": {"name": name}})

    async def account(self, namespace: str, name: str) -> None:
        with contextlib.suppress(errors.Conflict):
            await self.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})

    async def pod(
        self, namespace: str, name: str, ip: str, *, node: str = "node-a", account: str = "default"
    ) -> dict[str, Any]:
        made = await self.create(
            f"/api/v1/namespaces/{namespace}/pods",
            {
                "metadata": {"name": name, "labels": {"app": name}},
                "spec": {
                    "nodeName": node,
                    "serviceAccountName": account,
                    "containers": [{"name": "app", "image": "none"}],
                },
            },
        )
        status = {"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]}}
        await self.patch(f"/api/v1/namespaces/{namespace}/pods/{name}/status", status)
        return made

    async def token(
        self, namespace: str, account: str, *, pod: dict[str, Any] | None = None, audience: str = "undermesh-ca"
    ) -> str:
        spec: dict[str, Any] = {"audiences": [audience], "expirationSeconds": 3600}
        if pod is not None:
            bound = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
            spec["boundObjectRef"] = bound
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        made = await self.create(path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec})
        return str(made["status"]["token"])

    async def agent_pod(self, node: str = "node-a") -> dict[str, Any]:
        await self.account(SYSTEM, AGENT)
        await self.create("/api/v1/nodes", {"metadata": {"name": node}})
        return await self.pod(SYSTEM, f"agent-{node}", "192.0.2.1", node=node, account=AGENT)

    def kubeconfig_with(self, name: str, token: str) -> Path:
        """A kubeconfig for somebody who is known by a token."""
        config = yaml.safe_load(self.server.admin_kubeconfig())
        config["users"][0]["user"] = {"token": token}
        path = self.directory / f"{name}.kubeconfig"
        path.write_text(yaml.safe_dump(config))
        return path


@contextlib.asynccontextmanager
async def running(directory: Path, **settings: Any) -> AsyncIterator[Cluster]:
    async with ApiServer(Settings(directory / "apiserver", **settings)) as server:
        cluster = Cluster(server, directory)
        try:
            yield cluster
        finally:
            await cluster.api.close()
