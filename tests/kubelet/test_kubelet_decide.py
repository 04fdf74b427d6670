"""What the kubelet decides to do for a pod."""

from __future__ import annotations

import pytest
from podspecs import container, exited, pod, running, sidecar

from undermesh.lab.kubelet.backoff import Backoff
from undermesh.lab.kubelet.decide import Kill, Plan, Start, View, plan
from undermesh.lab.kubelet.health import Tally
from undermesh.lab.kubelet.local import latest
from undermesh.lab.runtime.types import ContainerStatus

INIT = container("init")
SIDE = sidecar("side")


def view(*statuses: ContainerStatus, sandbox: str = "s", started: str = "", unhealthy: str = "") -> View:
    newest, _ = latest(statuses)
    ill = {unhealthy: "liveness"} if unhealthy else {}
    return View(sandbox, newest, frozenset(started.split()), ill)


FINISHED = Plan(finished=True)
NOTHING = Plan()


@pytest.mark.parametrize(
    ("policy", "code", "expected"),
    [
        ("Always", 0, Plan(start=(Start("app", 1, 200.0),))),
        ("Always", 1, Plan(start=(Start("app", 1, 200.0),))),
        ("OnFailure", 0, FINISHED),
        ("OnFailure", 1, Plan(start=(Start("app", 1, 200.0),))),
        ("Never", 0, FINISHED),
        ("Never", 1, FINISHED),
    ],
)
def test_the_restart_policy_decides_whether_a_container_that_ended_is_started_again(
    policy: str, code: int, expected: Plan
) -> None:
    assert plan(pod(restartPolicy=policy), view(exited("app", code))) == expected


CASES = [
    pytest.param(pod(), view(sandbox=""), Plan(new_sandbox=True), id="a new pod needs a sandbox"),
    pytest.param(pod(), view(), Plan(start=(Start("app", 0),)), id="then its container is started"),
    pytest.param(pod(), view(running("app")), NOTHING, id="what runs is left alone"),
    pytest.param(
        pod(ephemeralContainers=[container("look")]),
        view(running("app")),
        Plan(start=(Start("look", 0),)),
        id="an ephemeral container is started beside what runs",
    ),
    pytest.param(
        pod(ephemeralContainers=[container("look")]),
        view(running("app"), exited("look", 1)),
        NOTHING,
        id="an ephemeral container that ended is not started again",
    ),
    pytest.param(
        pod(container("a"), container("b"), restartPolicy="Never"),
        view(exited("a"), running("b")),
        NOTHING,
        id="a pod goes on while one container runs",
    ),
    pytest.param(
        pod(),
        view(running("app", 2), unhealthy="app-2"),
        Plan(kill=(Kill("app", "app-2", "liveness"),)),
        id="a container that fails its liveness probe is killed",
    ),
    pytest.param(pod(init=(INIT,)), view(), Plan(start=(Start("init", 0),)), id="init containers come first"),
    pytest.param(pod(init=(INIT,)), view(running("init")), NOTHING, id="the others wait for them"),
    pytest.param(pod(init=(INIT,)), view(exited("init")), Plan(start=(Start("app", 0),)), id="and follow"),
    pytest.param(
        pod(init=(INIT, container("second"))),
        view(exited("init")),
        Plan(start=(Start("second", 0),)),
        id="init containers run one after the other",
    ),
    pytest.param(
        pod(init=(INIT,)),
        view(exited("init", 1)),
        Plan(start=(Start("init", 1, 200.0),)),
        id="an init container that failed is tried again",
    ),
    pytest.param(
        pod(init=(INIT,), restartPolicy="Never"), view(exited("init", 1)), FINISHED, id="unless the policy is Never"
    ),
    pytest.param(
        pod(init=(INIT,)),
        view(exited("init"), running("app")),
        NOTHING,
        id="init containers are not looked at once the pod is initialized",
    ),
    pytest.param(pod(init=(SIDE,)), view(), Plan(start=(Start("side", 0),)), id="a sidecar is started first"),
    pytest.param(pod(init=(SIDE,)), view(running("side")), NOTHING, id="until it has started the others wait"),
    pytest.param(
        pod(init=(SIDE,)),
        view(running("side"), started="side-0"),
        Plan(start=(Start("app", 0),)),
        id="then they are started beside it",
    ),
    pytest.param(
        pod(init=(SIDE,), restartPolicy="Never"),
        view(exited("side"), running("app")),
        Plan(start=(Start("side", 1, 200.0),)),
        id="a sidecar is restarted whatever the policy",
    ),
    pytest.param(
        pod(init=(SIDE,), restartPolicy="Never"),
        view(running("side"), exited("app"), started="side-0"),
        FINISHED,
        id="a pod is finished although a sidecar runs",
    ),
    pytest.param(
        pod(),
        view(exited("app", 255, 3, "old"), sandbox=""),
        Plan(new_sandbox=True),
        id="after a reboot there is a new sandbox",
    ),
    pytest.param(
        pod(),
        view(exited("app", 255, 3, "old"), sandbox="new"),
        Plan(start=(Start("app", 4),)),
        id="attempts are counted over sandboxes, without back-off",
    ),
    pytest.param(
        pod(restartPolicy="Never"),
        view(exited("app", 255, 0, "old"), sandbox=""),
        FINISHED,
        id="a pod that is never restarted gets no second sandbox",
    ),
    pytest.param(
        pod(restartPolicy="OnFailure"),
        view(exited("app", 0, 0, "old"), sandbox=""),
        FINISHED,
        id="nor does one that has succeeded",
    ),
]


@pytest.mark.parametrize(("spec", "seen", "expected"), CASES)
def test_the_next_steps_follow_from_spec_and_view(spec: dict[str, object], seen: View, expected: Plan) -> None:
    assert plan(spec, seen) == expected


def test_the_first_restart_is_immediate_and_each_further_one_waits_twice_as_long() -> None:
    backoff, now, delays = Backoff(), 1000.0, []
    for _ in range(8):
        until = backoff.until("key", now)
        delays.append(until - now)
        backoff.tried("key", now)
        now = until + 1
    assert delays == [0, 10, 20, 40, 80, 160, 300, 300]


def test_back_off_begins_anew_after_ten_minutes_of_health() -> None:
    backoff = Backoff()
    for at in (0.0, 20.0, 60.0):
        backoff.tried("key", at)
    assert backoff.until("key", 100.0) == 140.0
    assert backoff.until("key", 60.0 + 601.0) == 661.0


def test_back_off_of_a_pod_that_is_gone_is_forgotten() -> None:
    backoff = Backoff()
    for key in (("one", "app"), ("two", "app")):
        backoff.tried(key, 0.0)
    backoff.forget("one")
    assert [backoff.until((uid, "app"), 1.0) for uid in ("one", "two")] == [1.0, 11.0]


@pytest.mark.parametrize(
    ("results", "verdicts"),
    [
        ([False, False, False], [None, None, False]),
        ([False, False, True, False, False], [None, None, None, None, None]),
        ([True, True], [None, True]),
        ([True, True, False, True, True], [None, True, None, None, True]),
    ],
)
def test_a_probe_has_a_verdict_when_its_threshold_is_reached(results: list[bool], verdicts: list[bool | None]) -> None:
    tally = Tally(failures=3, successes=2)
    assert [tally.add(result) for result in results] == verdicts
