"""Who gets in and what they may do: tokens, certificates, RBAC, reviews."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from api_client import TOKENS, Client

from undermesh.lab.apiserver import ApiServer, Settings

RBAC = "/apis/rbac.authorization.k8s.io/v1"
SA = "/api/v1/namespaces/default/serviceaccounts"
PODS = "/api/v1/namespaces/default/pods"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "state", tokens=TOKENS, rbac=True)


async def request_token(api: Client, name: str, **spec: Any) -> str:
    found = await api.create(f"{SA}/{name}/token", {"spec": spec})
    return str(found["status"]["token"])


async def test_strangers_get_health_and_nothing_else(connect: Callable[[str], Client]) -> None:
    nobody = connect("")
    assert (await nobody.ask("GET", "/healthz")).status == 200
    refused = await nobody.ask("GET", PODS)
    assert (refused.status, refused.body["reason"]) == (403, "Forbidden")
    assert (
        'User "system:anonymous" cannot list resource "pods" in API group "" in the namespace "default"'
        in (refused.body["message"])
    )
    assert (await connect("wrong").ask("GET", "/healthz")).status == 401


async def test_roles_open_what_they_name(api: Client, connect: Callable[[str], Client]) -> None:
    ann = connect("ann-token")
    assert (await ann.ask("GET", PODS)).status == 403
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}]
    await api.create(f"{RBAC}/namespaces/default/roles", {"metadata": {"name": "r"}, "rules": rules})
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"}
    subjects = [{"kind": "Group", "name": "builders"}]
    binding = {"metadata": {"name": "b"}, "roleRef": reference, "subjects": subjects}
    await api.create(f"{RBAC}/namespaces/default/rolebindings", binding)
    assert (await ann.ask("GET", PODS)).status == 200
    assert (await ann.ask("GET", f"{PODS}?watch=1")).status == 403
    assert (await ann.ask("POST", PODS, {})).status == 403
    assert (await ann.ask("GET", "/api/v1/namespaces/kube-system/pods")).status == 403
    assert (await ann.ask("GET", "/apis")).status == 200
    assert (await ann.ask("POST", "/lab/compact")).status == 403
    review = {"spec": {"resourceAttributes": {"verb": "list", "resource": "pods", "namespace": "default"}}}
    found = await ann.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
    assert found["status"]["allowed"] is True and "rolebinding" in found["status"]["reason"].lower()
    other = {"spec": {**review["spec"], "user": "bob", "groups": ["nobodies"]}}
    found = await api.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", other)
    assert found["status"]["allowed"] is False


async def test_account_tokens_carry_their_pod_and_node(api: Client, connect: Callable[[str], Client]) -> None:
    node = await api.create("/api/v1/nodes", {"metadata": {"name": "n"}})
    spec = {"nodeName": "n", "containers": [{"name": "c", "image": "x"}]}
    pod = await api.create(PODS, {"metadata": {"name": "p"}, "spec": spec})
    uid = pod["metadata"]["uid"]
    bound = {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": uid}
    token = await request_token(api, "default", audiences=["undermesh-ca"], boundObjectRef=bound, expirationSeconds=600)
    keys = jwt.PyJWKSet.from_dict(await api.get("/openid/v1/jwks"))
    config = await api.get("/.well-known/openid-configuration")
    claims = jwt.decode(token, keys.keys[0], algorithms=["ES256"], audience="undermesh-ca", issuer=config["issuer"])
    assert claims["sub"] == "system:serviceaccount:default:default" and claims["exp"] - claims["iat"] == 600
    assert claims["kubernetes.io"]["pod"] == {"name": "p", "uid": uid}
    assert claims["kubernetes.io"]["node"] == {"name": "n", "uid": node["metadata"]["uid"]}
    assert (await connect(token).ask("GET", "/api")).status == 401

    async def review(audience: str) -> Any:
        body = {"spec": {"token": token, "audiences": [audience]}}
        return (await api.create("/apis/authentication.k8s.io/v1/tokenreviews", body))["status"]

    found = await review("undermesh-ca")
    assert found["authenticated"] and found["audiences"] == ["undermesh-ca"]
    assert found["user"]["extra"]["authentication.kubernetes.io/pod-name"] == ["p"]
    assert "system:serviceaccounts:default" in found["user"]["groups"]
    assert not (await review("other"))["authenticated"]
    await api.delete(f"{PODS}/p", {"gracePeriodSeconds": 0})
    gone = await review("undermesh-ca")
    assert not gone["authenticated"] and "no longer exists" in gone["error"]


async def test_an_account_is_a_user_until_it_is_deleted(api: Client, connect: Callable[[str], Client]) -> None:
    await api.create(SA, {"metadata": {"name": "bob"}})
    bob = connect(await request_token(api, "bob"))
    who = await bob.create("/apis/authentication.k8s.io/v1/selfsubjectreviews", {})
    assert who["status"]["userInfo"]["username"] == "system:serviceaccount:default:bob"
    await api.delete(f"{SA}/bob")
    assert (await bob.ask("GET", "/api")).status == 401


@pytest.mark.parametrize(
    ("account", "spec", "code"),
    [
        ("gone", {}, 404),
        ("default", {"expirationSeconds": 10}, 422),
        ("default", {"boundObjectRef": {"kind": "Pod", "name": "gone"}}, 404),
        ("default", {"boundObjectRef": {"kind": "Lamp", "name": "x"}}, 422),
    ],
)
async def test_tokens_that_cannot_be_are_refused(api: Client, account: str, spec: Any, code: int) -> None:
    assert (await api.ask("POST", f"{SA}/{account}/token", {"spec": spec})).status == code


async def test_acting_as_another_needs_the_right_to(api: Client, connect: Callable[[str], Client]) -> None:
    as_ann = {"Impersonate_User": "ann", "Impersonate_Group": "builders"}
    assert (await api.ask("GET", PODS, **as_ann)).status == 403
    refused = await connect("ann-token").ask("GET", PODS, Impersonate_User="root")
    assert refused.status == 403 and "cannot impersonate" in refused.body["message"]


async def test_a_client_certificate_names_its_user_and_groups(server: ApiServer, api: Client, tmp_path: Path) -> None:
    certificate, key = server.authority.client("carl", ("builders",))
    for name, content in (("cert", certificate), ("key", key)):
        (tmp_path / name).write_bytes(content)
    tls = ssl.create_default_context(cadata=server.authority.pem)
    tls.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    async with aiohttp.ClientSession() as session:
        path = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
        async with session.post(server.url + path, json={}, ssl=tls) as response:
            found = (await response.json())["status"]["userInfo"]
    assert found == {"username": "carl", "groups": ["builders", "system:authenticated"]}
