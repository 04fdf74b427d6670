"""What can go wrong in the control plane, by who has to act on it.

ControlPlaneError
├── ConfigError    a setting, a path or a file is wrong: the operator mends it
├── NotAuthorised  a caller asked for what it may not have; the reason is for the log only
├── BadRequest     an authorised caller sent something malformed; the reason goes to the log too
└── Superseded     a report comes on a stream that is not the node's newest
"""


class ControlPlaneError(Exception):
    """Base of the errors below."""


class ConfigError(ControlPlaneError):
    """A setting or file is unusable; the message names it, the cause and the next step."""


class NotAuthorised(ControlPlaneError):
    """The caller may not have what it asked for. Clients never see the message."""


class BadRequest(ControlPlaneError):
    """The request is malformed. Clients of the CA never see the message."""


class Superseded(ControlPlaneError):
    """A later stream of the same node has reported: this one's agent is gone, or has to report anew."""
