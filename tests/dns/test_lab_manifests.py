"""The manifests that every cluster of the lab has."""

from __future__ import annotations

from pathlib import Path

import pytest
from kubectl import Kubectl

import undermesh.lab
from undermesh.lab.client import ENDPOINT_SLICES, NAMESPACES, PODS, SERVICES, Access, Client, Forbidden, load
from undermesh.lab.dns.access import in_cluster

MANIFESTS = Path(next(iter(undermesh.lab.__path__))) / "manifests"


async def test_kubectl_applies_them_and_a_second_time_changes_nothing(kubectl: Kubectl, client: Client) -> None:
    await kubectl("apply", "-f", str(MANIFESTS))
    service = await client.get(SERVICES, "kube-dns", "kube-system")
    assert service["spec"]["clusterIPs"] == ["10.96.0.10", "fd00:96::a"]
    again = await kubectl("apply", "-f", str(MANIFESTS))
    assert {line.rsplit(" ", 1)[1] for line in again.splitlines()} == {"unchanged"}


async def test_the_account_may_read_what_names_are_made_from_and_no_more(
    kubectl: Kubectl, client: Client, kubeconfig: Path, tmp_path: Path
) -> None:
    await kubectl("apply", "-f", str(MANIFESTS))
    (tmp_path / "token").write_text((await client.token("coredns", "kube-system"))["token"])
    server = load(kubeconfig).server
    host, _, port = server.removeprefix("https://").rpartition(":")
    authority = await kubectl(
        "get", "configmap", "kube-root-ca.crt", "-n", "kube-system", "-o", r"jsonpath={.data.ca\.crt}"
    )
    (tmp_path / "ca.crt").write_text(authority)
    access: Access = in_cluster({"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}, tmp_path)
    async with Client(access) as coredns:
        for resource in (SERVICES, ENDPOINT_SLICES, NAMESPACES):
            await coredns.list(resource)
        with pytest.raises(Forbidden):
            await coredns.list(PODS)
