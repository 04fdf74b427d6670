"""The translation as the server uses it; notes on policies go into the log, once each."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from undermesh.api.identity import ObjectKey
from undermesh.api.objects import Objects
from undermesh.controlplane.publisher import Resources
from undermesh.controlplane.translate import Settings, translate

log = logging.getLogger(__name__)


class Translator:
    """Callable as `server.Translate`. Remembers what it logged."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._notes: dict[ObjectKey, tuple[str, ...]] = {}

    def __call__(self, objects: Objects, states: Mapping[str, int]) -> Resources:
        translation = translate(objects, states, self._settings)
        notes = {key: conversion.notes for key, conversion in translation.conversions.items()}
        for key, lines in notes.items():
            if lines != self._notes.get(key, ()):
                log.warning("AuthorizationPolicy %s: %s", key, "; ".join(lines) or "nothing is left out any more")
        self._notes = notes
        return translation.resources
