"""How a pod finds the API server: the variables and the projected volume that the kubelet gives it."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

from undermesh.lab.client import Access, ClientError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def in_cluster(environ: Mapping[str, str] = os.environ, account: Path = ACCOUNT) -> Access:
    """The access of the pod's service account, with the token as it is now.

    Raises:
        ClientError: this is no pod, or it has no token.
    """
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT")
    if not host or not port:
        raise ClientError("KUBERNETES_SERVICE_HOST and _PORT are not set: outside of a pod give --kubeconfig FILE")
    try:
        tls = ssl.create_default_context(cafile=str(account / "ca.crt"))
        token = (account / "token").read_text().strip()
    except (OSError, ssl.SSLError) as error:
        raise ClientError(f"{account}: {error}; the pod needs the token of a service account") from error
    address = f"[{host}]" if ":" in host else host
    return Access(f"https://{address}:{port}", tls, token)
