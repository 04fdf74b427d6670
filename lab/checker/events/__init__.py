"""What can be made happen under the connections: `EVENTS`, by name; the modules register them.

An event makes something happen, waits until it is over, and says when it was. `expectations.PROMISES` holds what
it may do to connections, under the same name.
"""

from __future__ import annotations

from undermesh.lab.checker.events import limits, network, parts, pods, policy
from undermesh.lab.checker.events.registry import EVENTS, Event

__all__ = ["EVENTS", "Event", "limits", "network", "parts", "pods", "policy"]
