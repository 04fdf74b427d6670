"""What each pod of the node can do, gathered into the full lists that the control plane gets."""

from __future__ import annotations

from undermesh.agent.bpf import layout
from undermesh.agent.bpf.layout import EnrolmentFlags
from undermesh.agent.bpf.node_capture import Capture
from undermesh.agent.reports import PodReport, Reporter
from undermesh.proto import report_pb2


def from_kernel(capture: Capture) -> dict[str, report_pb2.PodState.ValueType]:
    """The states that the kernel is in right now, by pod uid: what an earlier agent had reported."""
    uids = {
        int.from_bytes(key, "little"): layout.Pod.unpack(value).uid
        for key, value in capture.maps["pods"].entries().items()
    }
    states: dict[str, report_pb2.PodState.ValueType] = {}
    for value in capture.maps["enrolled"].entries().values():
        enrolment = layout.Enrolment.unpack(value)
        uid = uids.get(enrolment.pod)
        if uid is not None:
            outbound = enrolment.flags & EnrolmentFlags.OUTBOUND
            states[uid] = report_pb2.SENDS_TUNNELS if outbound else report_pb2.ACCEPTS_TUNNELS
    return states


class PodStates:
    """Turns the workers' single states into lists; starts from the kernel's, so that a restart flips nothing."""

    def __init__(self, reporter: Reporter, initial: dict[str, report_pb2.PodState.ValueType]) -> None:
        self._reporter = reporter
        self._reports = {uid: PodReport(uid, state) for uid, state in initial.items()}
        self._number = 0  # of the newest list

    def begin(self) -> None:
        """Makes the first report, of a node without pods too."""
        self._number = self._reporter.update(self._reports.values())

    def set_state(self, uid: str, state: report_pb2.PodState.ValueType, error: str) -> int:
        """Records and reports one pod's state; returns the number to wait for."""
        report = None if state == report_pb2.PLAIN and not error else PodReport(uid, state, error)
        if report == self._reports.get(uid) and self._number:
            return self._number  # as each look at a pod finds it
        if report is None:
            del self._reports[uid]
        else:
            self._reports[uid] = report
        self._number = self._reporter.update(self._reports.values())
        return self._number

    async def wait_published(self, sequence: int) -> None:
        await self._reporter.wait_published(sequence)
