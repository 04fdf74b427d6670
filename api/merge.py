"""Files that each read well may still contradict each other: which state of which file counts."""

from collections.abc import Mapping
from dataclasses import dataclass

from undermesh.api.core import Pod
from undermesh.api.documents import Located
from undermesh.api.objects import Object, ref
from undermesh.api.problems import Problem

Content = tuple[Located, ...]


@dataclass(frozen=True)
class Merged:
    """The content that counts of each file, and a problem for each file whose new content does not."""

    contents: Mapping[str, Content]
    problems: tuple[Problem, ...]


def merge(accepted: Mapping[str, Content], offered: Mapping[str, Content]) -> Merged:
    """Take each file's offered content unless it contradicts the others.

    Files whose content stands already come first; among the rest the earlier name wins, and a file that
    loses keeps what it had. So the outcome depends on the files alone, never on the order of events
    within one reading.

    Args:
        accepted: What counted until now, free of contradictions.
        offered: The content of every file that exists; equal to `accepted` where nothing changed.
    """
    refused: dict[str, Problem] = {}
    while True:
        settled = [name for name in offered if name in refused or offered[name] == accepted.get(name)]
        order = [*sorted(settled), *sorted(offered.keys() - set(settled))]
        contents = {name: accepted.get(name, ()) if name in refused else offered[name] for name in order}
        problem = _first_conflict(contents)
        if problem is None:
            return Merged(contents, tuple(sorted(refused.values())))
        refused[problem.file] = problem


def _first_conflict(contents: Mapping[str, Content]) -> Problem | None:
    """The first object that takes what an earlier one holds: its name, a pod's uid or a pod's address."""
    owners: dict[tuple[str, str], Located] = {}
    for content in contents.values():
        for located in content:
            for claim, advice in _claims(located.object):
                owner = owners.setdefault(claim, located)
                if owner is not located:
                    return _conflict(located, owner, claim, advice)
    return None


def _claims(obj: Object) -> list[tuple[tuple[str, str], str]]:
    claims = [(("object", str(ref(obj))), "remove one of the two")]
    if isinstance(obj, Pod):
        claims.append((("metadata.uid", obj.metadata.uid), "give each pod its own uid"))
        if not obj.finished and not obj.spec.host_network:
            addresses = dict.fromkeys(map(str, obj.addresses))
            claims += [(("status.podIPs", address), "give each pod its own address") for address in addresses]
    return claims


def _conflict(located: Located, owner: Located, claim: tuple[str, str], advice: str) -> Problem:
    what, value = claim
    if what == "object":
        field, message = "", f"stands in {owner.place} too: {advice}"
    else:
        field, message = what, f"{value} belongs to {ref(owner.object)} in {owner.place} too: {advice}"
    return Problem(located.file, message, located.document, located.item, str(ref(located.object)), field)
