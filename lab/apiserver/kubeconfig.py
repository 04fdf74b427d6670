"""KUBECONFIG files that hold everything a client needs."""

from __future__ import annotations

import base64
from pathlib import Path

import yaml

from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.pki import write_private


def kubeconfig(server: str, authority: str, user: Object, *, name: str = "undermesh-lab", namespace: str = "") -> str:
    """A KUBECONFIG with one cluster, one user and one context called `name`. `user` holds the credentials."""
    context: Object = {"cluster": name, "user": name}
    if namespace:
        context["namespace"] = namespace
    cluster = {"server": server, "certificate-authority-data": encoded(authority.encode())}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": context}],
        "current-context": name,
        "preferences": {},
    }
    return yaml.safe_dump(document, sort_keys=False)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def certificate_user(certificate: bytes, key: bytes) -> Object:
    """Credentials for a client certificate."""
    return {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}


def save(path: Path, text: str) -> None:
    """Write a KUBECONFIG, which holds secrets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, text.encode())
