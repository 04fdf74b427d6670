"""The six rows of the demo, in order. Each scene does something and judges what was then observed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from undermesh.lab import netns
from undermesh.lab.demo import judges
from undermesh.lab.demo.judges import SETTLE, gather, until
from undermesh.lab.demo.stage import GUEST, NAMESPACE, OBJECTS, Stage
from undermesh.lab.demo.traffic import SERVERS, broken, first_few

ENROL = "istio.io/dataplane-mode"
LONGEST_WAIT = 5.0
"""Seconds that a new connection may take while a ztunnel is replaced."""


async def plain(stage: Stage) -> None:
    """1: without the mesh the apps talk, and the wire shows what they say."""
    stage.report.say("1  the apps talk across the nodes, no mesh yet")
    short = await gather(client.once() for client in stage.clients)
    lasting = await gather(client.open("old") for client in stage.clients)
    seen = await stage.call(stage.capture.observe)
    wrong = broken([*short, *lasting])
    stage.report.row(
        "1 without the mesh, HTTP, server-first TCP and bulk work across nodes",
        not wrong,
        len(short) + len(lasting) - len(wrong),
        "connections",
        first_few(wrong) or f"{len(stage.web.targets)} ways to 3 servers, IPv4 and IPv6, by pod and by service",
    )
    missing = [
        f"{server}/IPv{family}"
        for server in SERVERS
        for family in (4, 6)
        if not any(stage.address(server, family) in (flow.source, flow.destination) for flow in seen.token)
    ]
    stage.report.row(
        "1 the wire between the nodes shows their token",
        not missing and seen.lost == 0,
        len(seen.token),
        "flows",
        f"not seen: {', '.join(missing)}" if missing else judges.trust(seen),
    )


async def enrol(stage: Stage) -> None:
    """2: the namespace is enrolled while connections are open."""
    stage.report.say("2  helm install: the mesh, control plane and DaemonSet")
    await stage.call(stage.cluster.install_mesh)
    stage.report.say(f"2  kubectl label namespace {NAMESPACE} {ENROL}=ambient, while the connections of row 1 are open")
    await stage.kubectl("label", "namespace", NAMESPACE, f"{ENROL}=ambient")
    seconds = await stage.call(stage.wait_shop, "enrolled")
    now = await stage.call(stage.look)
    other = [app for app, pod in stage.world.pods.items() if now.pods.get(app) != pod]
    stage.report.row(
        "2 every pod of the namespace is enrolled",
        not other,
        seconds,
        "s",
        f"replaced or restarted: {', '.join(other)}" if other else f"{len(stage.shop)} pods, none restarted",
    )
    await judges.open_ones(stage, "2 connections that were open then: none breaks", "old", stage.clients)
    wrong = broken(await gather(client.end("old") for client in stage.clients))
    stage.report.row("2 and each ends as it should", not wrong, len(wrong), "broken", first_few(wrong))


async def encrypted(stage: Stage) -> None:
    """3: new connections go through mTLS, with both identities."""
    stage.report.say("3  the same conversations again, all new")
    logs = {node: await stage.call(stage.access_log, node) for node in stage.nodes}
    await stage.call(stage.capture.observe)
    for log in logs.values():
        log.mark()
    short = await gather(client.once() for client in stage.clients)
    await gather(client.open("mesh") for client in stage.clients)
    await asyncio.sleep(SETTLE)
    outcomes = [*short, *await gather(client.report("mesh") for client in stage.clients)]
    seen = await stage.call(stage.capture.observe)
    wrong = broken(outcomes)
    stage.report.row(
        "3 new connections work",
        not wrong,
        len(outcomes) - len(wrong),
        "connections",
        first_few(wrong),
    )
    payload, encrypted_bytes = sum(outcome.payload for outcome in outcomes), seen.tls_bytes()
    stage.report.row(
        "3 the wire holds at least as many TLS 1.3 bytes as payload was sent",
        encrypted_bytes >= payload > 0 and seen.lost == 0,
        encrypted_bytes / max(payload, 1),
        "x payload",
        f"{encrypted_bytes:,} bytes for {payload:,} of payload; {judges.trust(seen)}",
    )
    judges.no_plaintext(stage, "3 and no token, nothing between pods outside of TLS", seen)
    judges.true_addresses(stage, "3 the servers see the clients' own addresses", outcomes)
    await judges.identities(stage, "3 the access logs name both identities, both ways", logs)
    await _visit(stage)


async def policy(stage: Stage) -> None:
    """4: a policy denies one service account."""
    stage.report.say("4  kubectl apply: an AuthorizationPolicy that denies the service account of batch")
    log = await stage.call(stage.access_log, stage.server_node.name)
    log.mark()
    started = time.monotonic()
    await stage.kubectl("apply", f"--filename={OBJECTS / 'deny-batch.yaml'}")
    cut = await until(5, lambda: stage.batch.report("mesh"), lambda found: not any(outcome.open for outcome in found))
    still = [str(outcome.target) for outcome in cut if outcome.open]
    stage.report.row(
        "4 its open connections are cut",
        not still and len(cut) == len(stage.web.targets),
        time.monotonic() - started,
        "s",
        f"still open: {', '.join(still)}" if still else f"{len(cut)} connections: {judges.errors(cut)}",
    )
    refused, allowed = await asyncio.gather(stage.batch.once(), stage.web.once())
    passed = [outcome for outcome in refused if outcome.error is None or "Timeout" in outcome.error]
    stage.report.row(
        "4 its new ones are refused",
        not passed,
        len(refused) - len(passed),
        "refused",
        first_few(passed) or judges.errors(refused),
    )
    wrong = broken(allowed)
    stage.report.row(
        "4 another account's new connections work",
        not wrong,
        len(allowed) - len(wrong),
        "connections",
        first_few(wrong) or "service account web",
    )
    await judges.open_ones(stage, "4 and its open ones live on", "mesh", [stage.web])
    await judges.reasons(stage, "4 log and metric say why", log)


async def crashes(stage: Stage) -> None:
    """5: ztunnel and agent are killed."""
    await gather([stage.web.end("mesh"), stage.batch.end("mesh")])
    await stage.call(stage.capture.observe)
    for node in stage.nodes:
        await _kill_ztunnel(stage, node)
    await _kill_agents(stage)
    seen = await stage.call(stage.capture.observe)
    judges.no_plaintext(stage, "5 none of them in plaintext", seen)


async def removal(stage: Stage) -> None:
    """6: un-enrol, stop and remove everything."""
    await stage.call(stage.remember_bpf)
    looks = (stage.pod_differences, stage.mesh_left_over, stage.host_differences)
    pods, mesh, host = [len(await stage.call(look)) for look in looks]
    stage.report.say(f"6  kubectl label namespace {NAMESPACE} {ENROL}-, while connections are open")
    await stage.web.open("last")
    await stage.kubectl("label", "namespace", NAMESPACE, f"{ENROL}-")
    await asyncio.sleep(SETTLE)
    await judges.open_ones(stage, "6 connections in tunnels outlive the enrolment", "last", [stage.web])
    await stage.web.end("last")
    seconds = await stage.call(stage.wait_shop, "plain")
    wrong = broken(await gather(client.once() for client in stage.clients))
    stage.report.row(
        "6 every pod is plain again, and the apps talk as before",
        not wrong,
        seconds,
        "s",
        first_few(wrong) or "after the last connection closed",
    )
    stage.report.say("6  helm uninstall")
    seconds = await stage.call(stage.remove_mesh)
    parts = await until(30, partial(stage.call, stage.mesh_parts), lambda found: not found)
    stage.report.row("6 helm uninstall ends every part", not parts, seconds, "s", ", ".join(parts))
    changed = await stage.call(stage.pod_differences)
    judges.same(stage, "6 the pods' links, rules, routes, sysctls, programs are as before", changed, pods)
    left = await until(5, partial(stage.call, stage.mesh_left_over), lambda found: not found)
    judges.same(stage, "6 no pin, no file and no BPF object of the mesh is left", left, mesh)
    await stage.leave()
    changed = await until(5, partial(stage.call, stage.host_differences), lambda found: not found)
    judges.same(stage, "6 the machine's links, pins, processes, cgroups, mounts ... are as before", changed, host)


SCENES: Sequence[Callable[[Stage], Awaitable[None]]] = (plain, enrol, encrypted, policy, crashes, removal)


async def _kill_ztunnel(stage: Stage, node: str) -> None:
    stage.report.say(f"5  killing ztunnel on {node}")
    part = await stage.call(stage.supervised, node, "ztunnel")
    pid = await stage.call(part.kill_child)
    rounds = []
    for _ in range(4):
        rounds.append(asyncio.create_task(stage.web.once(count=1)))
        await asyncio.sleep(0.1)
    outcomes = await gather(rounds)
    await stage.call(stage.wait_ready, node)
    wrong, wait = broken(outcomes), max(outcome.seconds for outcome in outcomes)
    stage.report.row(
        f"5 ztunnel killed on {node}: new connections wait and go through",
        not wrong and wait < LONGEST_WAIT,
        wait,
        "s longest",
        first_few(wrong) or f"{len(outcomes)} connections from the moment pid {pid} died",
    )


async def _kill_agents(stage: Stage) -> None:
    """Both at once, and their supervisors held, so that there is a time without agents to observe."""
    stage.report.say("5  killing the agents on both nodes")
    before = await stage.call(_listeners, stage)
    await stage.web.open("agents")
    parts = [await stage.call(stage.supervised, node, "agent") for node in stage.nodes]
    try:
        for part in parts:
            await stage.call(partial(part.kill_child, hold=True))
        fresh = await stage.web.once()
        await asyncio.sleep(SETTLE)
        wrong = [*broken(fresh), *broken(await stage.web.report("agents"))]
    finally:
        for part in parts:
            await stage.call(part.let_go)
    stage.report.row(
        "5 agents killed: nothing happens to open and new connections",
        not wrong,
        len(wrong),
        "broken",
        first_few(wrong) or f"{len(fresh)} new, {len(stage.web.targets)} open",
    )
    started = time.monotonic()
    for node in stage.nodes:
        await stage.call(stage.wait_ready, node)
    await stage.call(stage.wait_shop, "enrolled")
    seconds = time.monotonic() - started
    changed = [name for name, found in (await stage.call(_listeners, stage)).items() if found != before[name]]
    wrong = [*broken(await stage.web.once()), *broken(await stage.web.end("agents"))]
    stage.report.row(
        "5 the agents come back and take over what is there",
        not changed and not wrong,
        seconds,
        "s",
        f"other listeners: {', '.join(changed)}" if changed else first_few(wrong) or "same listening sockets",
    )


async def _visit(stage: Stage) -> None:
    """The namespace without the label: its pod is as before, and reaches the shop, as policy allows."""
    outcomes = await stage.guest.once()
    changed = [line for line in await stage.call(stage.pod_differences) if line.startswith(f"{GUEST}:")]
    wrong = broken(outcomes)
    stage.report.row(
        "3 a pod of another namespace is left alone, and reaches the shop",
        bool(outcomes) and not wrong and not changed,
        len(outcomes) - len(wrong),
        "connections",
        first_few(wrong) or "; ".join(changed[:2]) or "in plaintext: no policy forbids it",
    )


def _listeners(stage: Stage) -> dict[str, dict[int, tuple[str, int]]]:
    return {pod.name: netns.listeners(stage.netns(pod)) for pod in stage.shop}
