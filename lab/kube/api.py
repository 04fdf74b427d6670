"""A few questions to the API server, without the weight of a client library."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from undermesh.lab.errors import LabError


class Api:
    """Asks as the administrator of a KUBECONFIG that the lab wrote. Calls block."""

    def __init__(self, kubeconfig: Path) -> None:
        document = yaml.safe_load(kubeconfig.read_text())
        cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
        self._address = urlsplit(cluster["server"])
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._context = ssl.create_default_context(cadata=authority)
        with tempfile.NamedTemporaryFile() as pem:
            pem.write(base64.b64decode(user["client-certificate-data"]))
            pem.write(base64.b64decode(user["client-key-data"]))
            pem.flush()
            self._context.load_cert_chain(pem.name)

    def request(self, method: str, path: str, body: Any = None, *, seconds: float = 5.0) -> Any:
        """One request; its decoded answer.

        Raises:
            LabError: no answer in time, or one that is no success.
        """
        address = self._address
        connection = http.client.HTTPSConnection(
            address.hostname or "", address.port, timeout=seconds, context=self._context
        )
        try:
            headers = {"Accept": "application/json", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise LabError(f"API server: {method} {path}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if response.status >= 300:
            raise LabError(
                f"API server: {method} {path}: HTTP {response.status}: {text[:300].decode(errors='replace')}"
            )
        return json.loads(text)

    def get(self, path: str, *, seconds: float = 5.0) -> Any:
        """As `request`."""
        return self.request("GET", path, seconds=seconds)

    def nodes(self) -> dict[str, bool]:
        """Node names, and whether each is Ready."""
        return {node["metadata"]["name"]: condition(node, "Ready") for node in self.get("/api/v1/nodes")["items"]}


def condition(obj: Any, kind: str) -> bool:
    """Whether an object has a condition of that type that is True."""
    conditions = obj.get("status", {}).get("conditions") or ()
    return any(found["type"] == kind and found["status"] == "True" for found in conditions)


class Faults:
    """Trouble on request at the API server; see undermesh.lab.apiserver.faults for the fields of a fault."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def add(self, **fault: Any) -> None:
        """For example code=429, retryAfter=1, verb="list", resource="pods", count=3, share=0.5, delay=2."""
        self._api.request("POST", "/lab/faults", fault)

    def clear(self) -> None:
        """Remove every fault."""
        self._api.request("DELETE", "/lab/faults")

    def drop_watches(self, resource: str = "") -> int:
        """End running watches; how many."""
        query = f"?resource={resource}" if resource else ""
        return int(self._api.request("POST", f"/lab/drop-watches{query}")["dropped"])

    def compact(self) -> None:
        """Forget history: old watches and continue tokens get 410."""
        self._api.request("POST", "/lab/compact")
