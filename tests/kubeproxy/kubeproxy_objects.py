"""Services, EndpointSlices and Pods as the API has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Object = dict[str, Any]


def service(name: str, *addresses: str, ports: Sequence[Object] = (), **spec: Any) -> Object:
    own = {"clusterIP": addresses[0], "clusterIPs": list(addresses)} if addresses else {}
    wanted = list(ports) or [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}]
    return {"metadata": {"namespace": "default", "name": name}, "spec": {"ports": wanted, **own, **spec}}


def endpoint(address: str, node: str = "node1", **conditions: bool) -> Object:
    return {"addresses": [address], "nodeName": node, "conditions": {"ready": True, **conditions}}


def endpoint_slice(owner: str, *endpoints: Object, ports: Sequence[Object] = (), family: int = 4) -> Object:
    return {
        "metadata": {
            "namespace": "default",
            "name": f"{owner}-{family}",
            "labels": {"kubernetes.io/service-name": owner},
        },
        "addressType": f"IPv{family}",
        "endpoints": list(endpoints),
        "ports": list(ports) or [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }
