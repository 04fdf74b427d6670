"""An explanation as steps for people; pure. It only words what ztunnel has decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from undermesh.cli import answers

_CAPTURED = {
    "NOT_IN_MESH": "no",
    "BY_THIS_ZTUNNEL": "yes",
    "BY_ANOTHER_NODE": "yes",
}


@dataclass(frozen=True)
class Step:
    """One step of the way: what was asked, of which object, the result, why, and what would change it."""

    step: str
    result: str
    object: str
    why: str
    change: str = ""


def plain(step: Step) -> dict[str, object]:
    """For programs."""
    return asdict(step)


def steps(answer: answers.Explanation) -> list[Step]:
    """The way of a connection from the pod that makes it on."""
    return [_capture(answer), _destination(answer), *_ways(answer)]


def conclusion(answer: answers.Explanation) -> str:
    """One line: allowed, refused, or for some endpoints only."""
    what = f"{_source(answer)} to {answer.destination_address}"
    refused = sum(not way.allowed for way in answer.ways)
    if not answer.ways:
        return f"{what}: no way known to node {answer.node}"
    if not refused:
        return f"{what}: ALLOWED"
    if refused == len(answer.ways):
        return f"{what}: REFUSED"
    return f"{what}: REFUSED by {refused} of {len(answer.ways)} endpoints; which one gets it is drawn"


def _source(answer: answers.Explanation) -> str:
    return answer.source_workload or answer.source_address


def _capture(answer: answers.Explanation) -> Step:
    pod = answer.source_pod
    state = "" if pod is None or pod.state == pod.desired else f"; it is {pod.state} (wanted: {pod.desired})"
    if pod is not None and pod.reason and (state or answer.capture == "NOT_IN_MESH"):
        state += f": {pod.reason}"
    identity = answer.source_identity
    why, change = {
        "BY_THIS_ZTUNNEL": (f"ztunnel of {answer.node} serves the pod, as {identity}", ""),
        "BY_ANOTHER_NODE": (f"the mesh knows it as {identity}; its own node decides", "ask on that node to be certain"),
        "NOT_IN_MESH": (
            "not in the mesh: it dials by itself, in plaintext and without an identity",
            "label its namespace or pod undermesh.io/mesh=enabled",
        ),
    }[answer.capture]
    return Step("captured?", _CAPTURED[answer.capture], _source(answer), why + state, change)


def _destination(answer: answers.Explanation) -> Step:
    if answer.destination_service:
        mode = "" if answer.service_mode in ("", "any") else f", traffic policy {answer.service_mode}"
        count = sum(bool(way.workload) for way in answer.ways)
        many = f"one of {count} endpoints, drawn by capacity" if count > 1 else f"{count} usable endpoint"
        return Step("destination", "service", answer.destination_service, f"{answer.destination_address}: {many}{mode}")
    if answer.destination_workload:
        why = f"{answer.destination_address} is its own address"
        return Step("destination", "workload", answer.destination_workload, why)
    return Step("destination", "unknown", answer.destination_address, "no service and no workload of the mesh has it")


def _ways(answer: answers.Explanation) -> Iterator[Step]:
    several = len(answer.ways) > 1
    for number, way in enumerate(answer.ways, 1):
        mark = f" ({number})" if several else ""
        if answer.destination_service and way.workload:
            where = f"{way.endpoint} on node {way.node or '?'}"
            yield Step(f"endpoint{mark}", "candidate", way.workload, where)
        if not way.lane:
            yield Step(f"route{mark}", "REFUSED", way.workload or answer.destination_address, way.reason)
            continue
        yield Step(f"lane{mark}", way.lane, way.upstream, way.lane_reason)
        yield from _policy(way, mark)


def _policy(way: answers.Way, mark: str) -> Iterator[Step]:
    step = f"policy{mark}"
    if not way.judged and not way.allowed:
        yield Step(f"identity{mark}", "REFUSED", way.workload, way.reason)
        return
    if not way.judged:
        why = "the app itself" if way.lane == "own" else "nobody enforces policy there"
        change = "" if way.lane == "own" else "enrol the destination, if it is a pod"
        yield Step(step, "not asked", way.workload or way.endpoint, why, change)
        return
    for judgement in way.policies:
        if judgement.mode != "enforced":
            says = f"matches by rule {judgement.rule}" if judgement.rule else "does not match"
            why = f"{judgement.action}, {judgement.mode}: {says}, decides nothing"
            yield Step(step, "noted", judgement.name, why)
    yield _allowed(way, step) if way.allowed else _refused(way, step)


def _allowed(way: answers.Way, step: str) -> Step:
    decided = _decided(way)
    if decided is not None:
        why = f"{decided.action}, rule {decided.rule} matches"
        return Step(step, "allowed", decided.name, why, "a DENY policy that matches it, or this rule taken away")
    denials = [j.name for j in way.policies if j.mode == "enforced"]
    why = f"no ALLOW policy applies, and no DENY matches ({', '.join(denials)})" if denials else "no policy applies"
    return Step(step, "allowed", way.workload, why, "a DENY policy that matches it, or any ALLOW that does not")


def _refused(way: answers.Way, step: str) -> Step:
    decided = _decided(way)
    if decided is not None and decided.error:
        return Step(step, "REFUSED", decided.name, decided.error, "correct the policy")
    if decided is not None:
        why = f"{decided.action}, rule {decided.rule} matches"
        return Step(step, "REFUSED", decided.name, why, f"narrow rule {decided.rule} of {decided.name}, or delete it")
    wanted = [
        f"{j.name} {miss}" for j in way.policies if j.action == "ALLOW" and j.mode == "enforced" for miss in j.misses
    ]
    change = f"a connection that has: {'; or '.join(wanted)}" if wanted else ""
    return Step(step, "REFUSED", way.policy or way.workload, way.reason, change)


def _decided(way: answers.Way) -> answers.Judgement | None:
    return next((j for j in way.policies if j.name == way.policy and j.mode == "enforced"), None)
