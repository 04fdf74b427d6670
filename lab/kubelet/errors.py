"""What keeps a pod from running for now; each carries the reason that the pod's status shows."""

from __future__ import annotations

from undermesh.lab.errors import LabError


class ConfigError(LabError):
    """A container cannot be configured: a reference or a security setting does not work out.

    Shown as CreateContainerConfigError; tried again.
    """


class VolumeError(LabError):
    """A volume cannot be set up. Shown as an event FailedMount; tried again."""
