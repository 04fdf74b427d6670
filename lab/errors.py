"""Errors of the lab.

LabError
 ├── ToolError          a command that the lab runs failed
 ├── ManifestError      the YAML describes something the lab cannot build
 └── PreconditionError  this machine or user cannot run the lab; carries the exit code of the demo
"""

from __future__ import annotations

import os


class LabError(Exception):
    """What the lab cannot do, in one line: the object, the cause, and what to do next."""


class ToolError(LabError):
    """A command failed; the message holds the command and what it said."""


class ManifestError(LabError):
    """A Kubernetes object in the lab's YAML lacks something or contradicts another."""


class PreconditionError(LabError):
    """The lab cannot run here. `exit_code` follows sysexits(3)."""

    def __init__(self, message: str, exit_code: int = os.EX_UNAVAILABLE) -> None:
        super().__init__(message)
        self.exit_code = exit_code
