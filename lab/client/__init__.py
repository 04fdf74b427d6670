"""A small Kubernetes client for the lab's own components: controllers, kubelets, proxies, DNS.

Objects are plain dicts as in JSON. Nothing here knows what a component does; no threads, one event loop.

    async with Client(load(layout.node_kubeconfig), agent="kubelet") as client:
        pod = await client.get(PODS, "web-0", "shop")
        await client.patch_status(PODS, "web-0", "shop", {"status": {"phase": "Running"}})
        try:
            await client.delete(PODS, "web-0", "shop", grace=0, uid=pod["metadata"]["uid"])
        except NotFound:
            pass

        pods = Informer(client, PODS, field_selector="spec.nodeName=node1")
        async with pods:                          # lists, then watches until the block ends
            changes = pods.subscribe()            # first everything that is there, then each change
            while True:
                change = await changes.get()      # change.type, change.old, change.new
                print(change.type, change.obj["metadata"]["name"], len(pods.items()))

`pods.add_handler(function)` calls a plain function instead of filling a queue, `await pods.changed()` waits for
the next change of any object. Objects of an informer are shared: never edit them. `Recorder` writes Events,
`undermesh.lab.client.times` the API's times.
"""

from undermesh.lab.client.client import Client
from undermesh.lab.client.errors import (
    AlreadyExists,
    ApiStatus,
    ClientError,
    Conflict,
    Expired,
    Forbidden,
    Invalid,
    NotFound,
    TooManyRequests,
    Unreachable,
)
from undermesh.lab.client.events import Recorder
from undermesh.lab.client.informer import Change, ChangeType, Informer
from undermesh.lab.client.kubeconfig import Access, load
from undermesh.lab.client.resources import (
    CONFIG_MAPS,
    CONTROLLER_REVISIONS,
    CRON_JOBS,
    DAEMON_SETS,
    DEPLOYMENTS,
    ENDPOINT_SLICES,
    ENDPOINTS,
    EVENTS,
    JOBS,
    LEASES,
    NAMESPACES,
    NODES,
    PERSISTENT_VOLUME_CLAIMS,
    POD_DISRUPTION_BUDGETS,
    PODS,
    REPLICA_SETS,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    STATEFUL_SETS,
    Object,
    Resource,
)

__all__ = [
    "CONFIG_MAPS",
    "CONTROLLER_REVISIONS",
    "CRON_JOBS",
    "DAEMON_SETS",
    "DEPLOYMENTS",
    "ENDPOINTS",
    "ENDPOINT_SLICES",
    "EVENTS",
    "JOBS",
    "LEASES",
    "NAMESPACES",
    "NODES",
    "PERSISTENT_VOLUME_CLAIMS",
    "PODS",
    "POD_DISRUPTION_BUDGETS",
    "REPLICA_SETS",
    "SECRETS",
    "SERVICES",
    "SERVICE_ACCOUNTS",
    "STATEFUL_SETS",
    "Access",
    "AlreadyExists",
    "ApiStatus",
    "Change",
    "ChangeType",
    "Client",
    "ClientError",
    "Conflict",
    "Expired",
    "Forbidden",
    "Informer",
    "Invalid",
    "NotFound",
    "Object",
    "Recorder",
    "Resource",
    "TooManyRequests",
    "Unreachable",
    "load",
]
