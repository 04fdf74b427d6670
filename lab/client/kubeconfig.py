"""Reading a KUBECONFIG: where the API server is and how to prove who asks."""

from __future__ import annotations

import base64
import binascii
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from undermesh.lab.client.errors import ClientError


@dataclass(frozen=True)
class Access:
    """One way to one API server."""

    server: str
    """https://address:port"""
    tls: ssl.SSLContext
    token: str = ""


def load(path: Path) -> Access:
    """The current context of a KUBECONFIG. References to files are relative to it.

    Raises:
        ClientError: the file cannot be read or lacks something.
    """
    try:
        document = yaml.safe_load(path.read_text())
        current = document["current-context"]
        context = _named(document, "contexts", current)["context"]
        cluster = _named(document, "clusters", context["cluster"])["cluster"]
        user = _named(document, "users", context["user"])["user"]
        return Access(cluster["server"].rstrip("/"), _tls(path.parent, cluster, user), _token(path.parent, user))
    except (OSError, yaml.YAMLError, KeyError, TypeError, binascii.Error, ssl.SSLError) as error:
        raise ClientError(f"{path}: no usable KUBECONFIG: {error!r}; give the one that the lab wrote") from error


def _named(document: Any, section: str, name: str) -> Any:
    for entry in document[section]:
        if entry["name"] == name:
            return entry
    raise KeyError(f"{section}: {name}")


def _data(folder: Path, section: Any, key: str) -> bytes:
    if f"{key}-data" in section:
        return base64.b64decode(section[f"{key}-data"])
    return (folder / section[key]).read_bytes() if key in section else b""


def _tls(folder: Path, cluster: Any, user: Any) -> ssl.SSLContext:
    authority = _data(folder, cluster, "certificate-authority")
    context = ssl.create_default_context(cadata=authority.decode() or None)
    if cluster.get("insecure-skip-tls-verify"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    certificate, key = _data(folder, user, "client-certificate"), _data(folder, user, "client-key")
    if certificate:
        with tempfile.NamedTemporaryFile(prefix="um-client-") as both:
            both.write(certificate + b"\n" + key)
            both.flush()
            context.load_cert_chain(both.name)
    return context


def _token(folder: Path, user: Any) -> str:
    if "token" in user:
        return str(user["token"])
    return (folder / user["tokenFile"]).read_text().strip() if "tokenFile" in user else ""
