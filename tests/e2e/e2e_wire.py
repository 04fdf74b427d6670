"""Watches the wire between the nodes for what should not be on it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

from undermesh.lab.capture import Capture
from undermesh.lab.cluster import Cluster
from undermesh.lab.wire import HBONE_PORT, Flow, Observation


class Wire:
    """A capture on the underlay, and the token that the payload carries meanwhile."""

    def __init__(self, cluster: Cluster) -> None:
        self.token = f"e2e-{secrets.token_hex(12)}"
        self._pods = {address for pod in cluster.manifest.pods for address in pod.addresses}
        self._capture = Capture(cluster.nodes["node1"].netns, "u0", self.token.encode())

    @classmethod
    @contextlib.contextmanager
    def watched(cls, cluster: Cluster) -> Iterator[Wire]:
        """A capture for a while."""
        wire = cls(cluster)
        try:
            yield wire
        finally:
            wire._capture.close()

    def assert_no_plaintext(self) -> Observation:
        """Nothing but tunnels between pods since the last look, and something in them."""
        seen = self.assert_hidden()
        assert seen.tls_bytes() > 0, "no tunnel was used"
        return seen

    def assert_hidden(self) -> Observation:
        """Nothing but tunnels between pods since the last look."""
        seen = self._capture.observe()
        assert seen.lost == 0, f"the capture lost {seen.lost} packets"
        assert not seen.token, f"the payload in the clear: {sorted(map(str, seen.token))}"
        bare = {str(flow): count for flow, count in seen.payload.items() if self._is_bare(flow) and count}
        assert not bare, f"bytes between pods outside of tunnels: {bare}"
        return seen

    def assert_plaintext(self) -> None:
        """The payload is there to be seen: the capture works."""
        assert self._capture.observe().token, "the token is not on the wire"

    def _is_bare(self, flow: Flow) -> bool:
        return flow.source in self._pods and flow.destination in self._pods and not flow.uses(HBONE_PORT)
