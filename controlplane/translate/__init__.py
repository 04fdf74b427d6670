"""Objects to xDS resources: pure functions, no I/O, no clock, no state.

`translate` is the whole of it; the modules beside it hold one kind of resource each. Equal input gives
equal bytes in every process, so any replica can resume any client.
"""

from undermesh.controlplane.translate.authorization import Conversion
from undermesh.controlplane.translate.resources import (
    ADDRESS_TYPE,
    AUTHORIZATION_TYPE,
    Resource,
    ResourceKey,
)
from undermesh.controlplane.translate.settings import Settings
from undermesh.controlplane.translate.snapshot import Translation, translate

__all__ = [
    "ADDRESS_TYPE",
    "AUTHORIZATION_TYPE",
    "Conversion",
    "Resource",
    "ResourceKey",
    "Settings",
    "Translation",
    "translate",
]
