"""Objects to xDS resources: pure, no I/O, no clock.

`translate` says what the resources of a state are, `Index` keeps them up to date at the price of what has changed.
The modules beside them hold one kind of resource each. Equal input gives equal bytes in every process, so any replica
can resume any client.
"""

from undermesh.controlplane.translate.authorization import Conversion
from undermesh.controlplane.translate.index import Index
from undermesh.controlplane.translate.resources import (
    ADDRESS_TYPE,
    AUTHORIZATION_TYPE,
    Resource,
    ResourceKey,
    Update,
)
from undermesh.controlplane.translate.settings import Settings
from undermesh.controlplane.translate.snapshot import Translation, translate

__all__ = [
    "ADDRESS_TYPE",
    "AUTHORIZATION_TYPE",
    "Conversion",
    "Index",
    "Resource",
    "ResourceKey",
    "Settings",
    "Translation",
    "Update",
    "translate",
]
