"""What a pod's status says."""

from __future__ import annotations

from typing import Any

import pytest
from podspecs import container, exited, pod, running, sidecar

from undermesh.lab.kubelet.local import latest
from undermesh.lab.kubelet.status import Observed, Verdict, Waiting, pod_status
from undermesh.lab.runtime.types import ContainerStatus

NODE = ("172.30.0.11", "fd00:30::11")
NOW = 1_000_000_000.0


def status(spec: dict[str, Any], *statuses: ContainerStatus, ready: str = "", **seen: Any) -> dict[str, Any]:
    newest, before = latest(statuses)
    ids = frozenset(ready.split())
    observed = Observed(
        containers=newest,
        before=before,
        **{"ready": ids, "started": ids, "sandbox_ready": True, "node_addresses": NODE, "start_time": NOW, **seen},
    )
    return pod_status(spec, observed, NOW)


def condition(found: dict[str, Any], kind: str) -> tuple[str, str | None, str | None]:
    one = next(c for c in found["conditions"] if c["type"] == kind)
    return one["status"], one["reason"], one["message"]


INIT = container("init")
TWO = (container("a"), container("b"))
PHASES = [
    pytest.param(pod(), (), False, "Pending", id="nothing was started yet"),
    pytest.param(pod(), (running("app"),), False, "Running", id="it runs"),
    pytest.param(pod(), (exited("app", 1),), False, "Running", id="it will be restarted"),
    pytest.param(pod(*TWO), (running("a"),), False, "Pending", id="one was not started yet"),
    pytest.param(pod(restartPolicy="Never"), (exited("app", 0),), False, "Succeeded", id="never, succeeded"),
    pytest.param(pod(restartPolicy="Never"), (exited("app", 2),), False, "Failed", id="never, failed"),
    pytest.param(pod(restartPolicy="OnFailure"), (exited("app", 0),), False, "Succeeded", id="on failure, succeeded"),
    pytest.param(pod(restartPolicy="OnFailure"), (exited("app", 2),), False, "Running", id="on failure, failed"),
    pytest.param(
        pod(*TWO, restartPolicy="Never"), (exited("a", 1), running("b")), False, "Running", id="one still runs"
    ),
    pytest.param(pod(init=(INIT,)), (running("init"),), False, "Pending", id="initializing"),
    pytest.param(
        pod(init=(INIT,), restartPolicy="Never"), (exited("init", 1),), False, "Failed", id="init failed for good"
    ),
    pytest.param(pod(init=(INIT,)), (exited("init", 1),), False, "Pending", id="init is tried again"),
    pytest.param(pod(), (exited("app", 0),), True, "Succeeded", id="ended at deletion"),
    pytest.param(pod(), (exited("app", 137),), True, "Failed", id="killed at deletion"),
    pytest.param(pod(status={"phase": "Failed"}), (running("app"),), False, "Failed", id="a final phase stays"),
]


@pytest.mark.parametrize(("spec", "containers", "ended", "phase"), PHASES)
def test_the_phase_follows_from_the_containers(
    spec: dict[str, Any], containers: tuple[ContainerStatus, ...], ended: bool, phase: str
) -> None:
    assert status(spec, *containers, ended=ended)["phase"] == phase


@pytest.mark.parametrize(
    ("spec", "waiting", "reason"),
    [
        (pod(), {}, "ContainerCreating"),
        (pod(init=(INIT,)), {}, "PodInitializing"),
        (pod(), {"app": Waiting("ErrImagePull", "no")}, "ErrImagePull"),
    ],
)
def test_a_container_that_was_not_started_waits_for_a_reason(
    spec: dict[str, Any], waiting: dict[str, Waiting], reason: str
) -> None:
    found = status(spec, waiting=waiting)["containerStatuses"][0]
    assert found["state"]["waiting"]["reason"] == reason
    assert (found["ready"], found["started"], found["restartCount"], found["lastState"]) == (False, False, 0, {})
    assert "containerID" not in found


def test_a_crash_loop_shows_the_last_end_and_the_number_of_restarts() -> None:
    why = Waiting("CrashLoopBackOff", "back-off 10s")
    seen = status(pod(), exited("app", 3, 1), waiting={"app": why}, messages={"app-1": "reason"})
    found = seen["containerStatuses"][0]
    assert found["state"] == {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
    last = found["lastState"]["terminated"]
    assert (last["exitCode"], last["reason"], last["message"]) == (3, "Error", "reason")
    assert (found["restartCount"], last["containerID"]) == (1, "containerd://app-1")


def test_a_running_container_shows_how_the_one_before_ended() -> None:
    found = status(pod(), exited("app", 137, 0), running("app", 1), ready="app-1")["containerStatuses"][0]
    assert found["state"] == {"running": {"startedAt": "1970-01-01T00:01:40Z"}}
    assert found["lastState"]["terminated"]["exitCode"] == 137
    assert (found["ready"], found["started"], found["restartCount"]) == (True, True, 1)
    assert (found["containerID"], found["imageID"]) == ("containerd://app-1", "sha256:1")


def test_a_pod_is_ready_when_all_its_containers_are() -> None:
    found = status(pod(*TWO), running("a"), running("b"), ready="a-0 b-0")
    for kind in ("PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready"):
        assert condition(found, kind) == ("True", None, None)


def test_a_pod_is_not_ready_while_one_container_is_not() -> None:
    found = status(pod(*TWO), running("a"), running("b"), ready="a-0")
    for kind in ("ContainersReady", "Ready"):
        assert condition(found, kind) == ("False", "ContainersNotReady", "containers with unready status: [b]")


def test_a_pod_with_unfinished_init_containers_is_not_initialized() -> None:
    found = status(pod(init=(INIT, container("more"))), exited("init"))
    text = "containers with incomplete status: [more]"
    assert condition(found, "Initialized") == ("False", "ContainersNotInitialized", text)
    assert found["initContainerStatuses"][0]["ready"] is True


def test_an_unready_sidecar_makes_the_pod_unready() -> None:
    found = status(pod(init=(sidecar("side"),)), running("side"), running("app"), ready="app-0")
    assert condition(found, "Ready") == ("False", "ContainersNotReady", "containers with unready status: [side]")


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ("True", ("True", None, None)),
        (
            "False",
            ("False", "ReadinessGatesNotReady", 'the status of pod readiness gate "x/y" is not "True", but False'),
        ),
        (
            None,
            (
                "False",
                "ReadinessGatesNotReady",
                'corresponding condition of pod readiness gate "x/y" does not exist.',
            ),
        ),
    ],
)
def test_readiness_gates_are_waited_for(gate: str | None, expected: tuple[str, str | None, str | None]) -> None:
    stored = {"conditions": [{"type": "x/y", "status": gate}]} if gate else None
    found = status(pod(readinessGates=[{"conditionType": "x/y"}], status=stored), running("app"), ready="app-0")
    assert condition(found, "Ready") == expected
    assert condition(found, "ContainersReady")[0] == "True"


@pytest.mark.parametrize(("code", "reason"), [(0, "PodCompleted"), (1, "PodFailed")])
def test_a_pod_that_has_ended_is_not_ready(code: int, reason: str) -> None:
    found = status(pod(restartPolicy="Never"), exited("app", code), ended=True)
    assert condition(found, "Ready")[:2] == ("False", reason)


def test_a_condition_keeps_its_time_until_its_status_changes() -> None:
    before = {
        "conditions": [
            {"type": "Ready", "status": "False", "lastTransitionTime": "old"},
            {"type": "Initialized", "status": "True", "lastTransitionTime": "old"},
        ]
    }
    found = status(pod(status=before), running("app"), ready="app-0")
    times = {c["type"]: c["lastTransitionTime"] for c in found["conditions"]}
    assert (times["Initialized"], times["Ready"]) == ("old", "2001-09-09T01:46:40Z")


def test_addresses_of_both_families_are_reported_and_old_ones_taken_away() -> None:
    spec = pod(status={"podIPs": [{"ip": "10.244.1.2"}, {"ip": "fd00::2"}]})
    found = status(spec, running("app"), addresses=("10.244.1.9", "fd00::2"))
    assert (found["podIP"], found["hostIP"]) == ("10.244.1.9", "172.30.0.11")
    assert found["hostIPs"] == [{"ip": "172.30.0.11"}, {"ip": "fd00:30::11"}]
    assert found["podIPs"] == [{"ip": "10.244.1.9"}, {"ip": "fd00::2"}, {"$patch": "delete", "ip": "10.244.1.2"}]


def test_a_pod_that_ran_too_long_has_failed() -> None:
    found = status(pod(), exited("app", 0), ended=True, verdict=Verdict("DeadlineExceeded", "too long"))
    assert (found["phase"], found["reason"], found["message"]) == ("Failed", "DeadlineExceeded", "too long")
