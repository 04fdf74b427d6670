"""What `undermesh check` says of a running agent: one pure function per line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from undermesh.agent.features import Check
from undermesh.agent.pod_worker import State
from undermesh.agent.reconciler import PodView
from undermesh.agent.xds import XdsStatus
from undermesh.api.problems import Problem


def control_plane(status: XdsStatus) -> Check:
    return Check(
        "control plane",
        status.connected,
        f"{status.address}: " + ("connected" if status.connected else status.error or "not connected"),
        "see the control plane's log; enrolled pods go on with the last state",
    )


def ztunnel(peer: tuple[str, str, int] | None) -> Check:
    """Of (instance, build, pid) of the connected ztunnel."""
    return Check(
        "ztunnel",
        peer is not None,
        f"{peer[1]}, pid {peer[2]}" if peer else "not connected",
        "see the log of the ztunnel container; connections wait meanwhile",
    )


def objects(problems: Sequence[Problem]) -> Check:
    return Check(
        "objects",
        not problems,
        "; ".join(str(problem) for problem in problems) or "all read",
        "mend what is named: the last good state of it stands",
    )


def pods(views: Sequence[PodView]) -> Check:
    failing = [view for view in views if view.desired and view.state is not State.ENROLLED]
    return Check(
        "pods",
        not failing,
        "; ".join(f"{v.pod.metadata.key}: {v.state}, {v.reason}" for v in failing) or "all as labelled",
        "see `undermesh status`",
    )


def certificates(errors: Mapping[str, str]) -> Check:
    """Of the last error by identity."""
    return Check(
        "certificates",
        not errors,
        "; ".join(f"{identity}: {error}" for identity, error in errors.items()) or "all issued",
        "see the control plane's log for the reason",
    )
