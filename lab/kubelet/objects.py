"""ConfigMaps, Secrets and Services that pods refer to, kept up to date by one watch each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from types import TracebackType

from undermesh.lab.client import CONFIG_MAPS, SECRETS, SERVICES, Change, Client, Informer, NotFound, Object
from undermesh.lab.kubelet.env import Reference, service_variables


class Objects:
    """An async context manager that is entered when everything is listed.

    Args:
        changed: told kind, namespace and name of a ConfigMap or Secret that changed.
    """

    def __init__(self, client: Client, changed: Callable[[str, str, str], None]) -> None:
        self._client = client
        self._changed = changed
        self._informers = {"ConfigMap": Informer(client, CONFIG_MAPS), "Secret": Informer(client, SECRETS)}
        self._services = Informer(client, SERVICES)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Objects:
        async with AsyncExitStack() as stack:
            for informer in (*self._informers.values(), self._services):
                await stack.enter_async_context(informer)
            self._stack = stack.pop_all()
        for kind, informer in self._informers.items():
            informer.add_handler(lambda change, kind=kind: self._report(kind, change))  # type: ignore[misc]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def find(self, namespace: str, references: Iterable[Reference]) -> dict[Reference, Object]:
        """Those that exist. Raises ClientError."""
        found = {}
        for reference in references:
            obj = await self._get(reference, namespace)
            if obj is not None:
                found[reference] = obj
        return found

    def service_variables(self, namespace: str, *, links: bool) -> dict[str, str]:
        """Of the services as they are now."""
        return service_variables(list(self._services.items()), namespace, links)

    async def _get(self, reference: Reference, namespace: str) -> Object | None:
        kind, name = reference
        informer = self._informers[kind]
        found = informer.get(name, namespace)
        if found is not None:
            return found
        # A pod can be seen before what was created just before it.
        try:
            return await self._client.get(informer.resource, name, namespace)
        except NotFound:
            return None

    def _report(self, kind: str, change: Change) -> None:
        metadata = change.obj["metadata"]
        self._changed(kind, metadata["namespace"], metadata["name"])
