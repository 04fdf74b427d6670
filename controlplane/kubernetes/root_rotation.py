"""Takes the steps of `rotation` in the cluster. Done by the leader.

`undermesh-ca` is changed only from the state that was looked at, so that two leaders at once do no harm.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections.abc import Callable, Sequence
from typing import NoReturn

from cryptography import x509

from undermesh.controlplane import errors, rotation
from undermesh.controlplane.issuer import OWN_SECRET, USER_SECRET, Secrets
from undermesh.controlplane.kubernetes.complaint import Complaint
from undermesh.controlplane.kubernetes.secrets import KubernetesSecretStore

log = logging.getLogger(__name__)


class RootRotation:
    """Keeps what signs in step with what is wanted.

    Args:
        store: The Secrets.
        lacking: Who does not trust a root yet.
        clock: The time by which roots are retired.
        interval: Seconds between two looks.
    """

    def __init__(
        self,
        store: KubernetesSecretStore,
        lacking: Callable[[x509.Certificate], Sequence[str]],
        clock: Callable[[], dt.datetime],
        interval: float,
    ) -> None:
        self._store = store
        self._lacking = lacking
        self._clock = clock
        self._interval = interval
        self._complaint = Complaint(log)

    async def run(self) -> NoReturn:
        """Takes one step after the other, for ever."""
        while True:
            try:
                await self.step()
                self._complaint.end()
            except errors.ConfigError as error:
                self._complaint.say(f"the root cannot be looked after: {error}")
            await asyncio.sleep(self._interval)

    async def step(self) -> None:
        """One look, and a write if there is anything to change.

        Raises:
            ConfigError: the Secrets cannot be read or written, or hold what cannot be used.
        """
        user = await self._store.read(USER_SECRET)
        own = await self._store.read_versioned(OWN_SECRET)
        if own is None:
            # With `cacerts` from the start nobody has made it.
            await self._store.create(OWN_SECRET, {rotation.STATE: b"{}"})
            return
        secrets = Secrets(own.entries or None, user)
        taken = rotation.step(secrets, own.annotations.get(rotation.REQUEST, ""), self._lacking, self._clock())
        if not taken.entries and own.annotations.get(rotation.STANDING) == taken.standing:
            return
        written = await self._store.change(OWN_SECRET, own.version, taken.entries, {rotation.STANDING: taken.standing})
        for event in taken.events if written else ():
            log.warning("root: %s", event)
