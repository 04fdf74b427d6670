"""A trouble that lasts, told once and not at every attempt."""

from __future__ import annotations

import logging


class Complaint:
    """What is wrong now, as far as the log knows."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._said = ""

    def say(self, text: str, *, cause: str = "") -> None:
        """Logs `text`, unless it was the last that was said, or `cause` was what was said last."""
        if (cause or text) != self._said:
            self._said = cause or text
            self._log.warning("%s", text)

    def end(self) -> None:
        """It is well again: the same trouble is worth telling the next time."""
        self._said = ""
