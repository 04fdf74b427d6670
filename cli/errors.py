"""What the command tells its user when it cannot answer: one line each, with the cause and the next step.

CliError
+-- AgentAbsent       no socket: undermesh does not run here, or under another run directory
+-- AgentUnreachable  a socket that cannot be used: no rights, nobody listens, no answer in time
+-- AgentRefused      the agent answered, with an error of its own
+-- AnswerUnreadable  what answered does not speak the agent's protocol, or another version of it
"""

import click

_MAX_FOREIGN_TEXT = 300


class CliError(click.ClickException):
    """Shown as `Error: ...`; the exit status is 1."""

    exit_code = 1


class AgentAbsent(CliError):
    """There is no agent socket at the given path."""


class AgentUnreachable(CliError):
    """There is a socket, and no way to an agent through it."""


class AgentRefused(CliError):
    """The agent said why it cannot answer now; `status` is that of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class AnswerUnreadable(CliError):
    """The answer is not what this version of the command understands."""


def foreign(text: str) -> str:
    """Text that another process chose, fit for a terminal: one line, no control characters, not too long."""
    line = " ".join(text.split())
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return shown if len(shown) <= _MAX_FOREIGN_TEXT else shown[:_MAX_FOREIGN_TEXT] + "..."
