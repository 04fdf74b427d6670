"""The query parameters that the API knows, read once and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from undermesh.lab.apiserver.errors import Cause, bad_request, invalid
from undermesh.lab.apiserver.selectors import FieldTerm, Requirement, Selection, parse_fields, parse_labels, selection

_NAMED = re.compile(r"(?:^|,)metadata\.name==?([^,=!]+)(?=,|$)")
_TRUE = ("true", "1", "True", "t", "T", "TRUE")


def flag(query: Mapping[str, str], name: str) -> bool:
    """Whether a boolean parameter is set; as in Go, an empty value counts as true."""
    value = query.get(name)
    return value is not None and (value == "" or value in _TRUE)


def number(query: Mapping[str, str], name: str) -> int | None:
    """A whole number, None when absent. Raises ApiError 400."""
    text = query.get(name, "")
    if not text:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise bad_request(f'strconv.ParseInt: parsing "{text}": invalid syntax for {name}') from error


def named_in(query: Mapping[str, str]) -> str:
    """The one object that the field selector names, by which RBAC judges lists and watches; else empty."""
    found = _NAMED.search(query.get("fieldSelector", ""))
    return found.group(1) if found else ""


@dataclass(frozen=True)
class ListOptions:
    """Parameters of list, watch and deletecollection."""

    labels: tuple[Requirement, ...]
    fields: tuple[FieldTerm, ...]
    limit: int
    token: str
    """The `continue` parameter."""
    version: str
    match: str
    """resourceVersionMatch."""
    watch: bool
    bookmarks: bool
    initial_events: bool
    timeout: int | None
    """Seconds."""

    @property
    def selection(self) -> Selection | None:
        return selection(self.labels, self.fields)

    @property
    def name(self) -> str:
        """The one object that can match, if the field selector names it."""
        return next((term.value for term in self.fields if term.path == "metadata.name" and term.equal), "")


def list_options(query: Mapping[str, str], resource: str, selectable: frozenset[str]) -> ListOptions:
    """Raises ApiError 400 and 422 for parameters that make no sense."""
    version = query.get("resourceVersion", "")
    if version and not version.isdigit():
        raise bad_request(f'Invalid value: "{version}": strconv.ParseUint: parsing "{version}": invalid syntax')
    options = ListOptions(
        parse_labels(query.get("labelSelector", "")),
        parse_fields(query.get("fieldSelector", ""), resource, selectable),
        max(number(query, "limit") or 0, 0),
        query.get("continue", ""),
        version,
        query.get("resourceVersionMatch", ""),
        flag(query, "watch"),
        flag(query, "allowWatchBookmarks"),
        flag(query, "sendInitialEvents"),
        number(query, "timeoutSeconds"),
    )
    problem = _problem(options, "sendInitialEvents" in query)
    if problem:
        field, text = problem
        raise invalid("meta.k8s.io", "ListOptions", "", [Cause("FieldValueForbidden", f"Forbidden: {text}", field)])
    return options


def _problem(options: ListOptions, has_initial_events: bool) -> tuple[str, str] | None:
    if options.watch:
        if has_initial_events and options.match != "NotOlderThan":
            return "resourceVersionMatch", "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
        if not has_initial_events and options.match:
            return (
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            )
        return None
    if has_initial_events:
        return "sendInitialEvents", "sendInitialEvents is forbidden for list"
    if options.match and options.token:
        return "resourceVersionMatch", "resourceVersionMatch is forbidden when continue is provided"
    if options.match and not options.version:
        return "resourceVersionMatch", "resourceVersionMatch is forbidden unless resourceVersion is provided"
    if options.match == "Exact" and options.version == "0":
        return "resourceVersionMatch", 'resourceVersionMatch "exact" is forbidden for resourceVersion "0"'
    if options.match not in ("", "Exact", "NotOlderThan"):
        return "resourceVersionMatch", f"unsupported value {options.match}"
    return None
