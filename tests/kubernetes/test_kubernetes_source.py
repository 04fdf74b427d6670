"""The source against a scripted server: one failure policy per test."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path

import pytest
from scripted_server import (
    NAMESPACES,
    PODS,
    POLICIES,
    Answer,
    Server,
    error_event,
    garbage,
    namespace,
    pod,
    policy,
    reset,
    status,
)
from source_harness import FAST, Watched, until

from undermesh.api.identity import ObjectKey
from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.api import Api
from undermesh.api.kubernetes.resources import for_agent
from undermesh.api.kubernetes.source import KubernetesSource


async def test_the_first_state_holds_every_kind_and_later_ones_follow_the_events(
    server: Server, watched: Watched
) -> None:
    await server.put(NAMESPACES, namespace("shop"))
    await server.put(PODS, pod("web"))
    first = await watched.start()
    assert list(first.namespaces) == ["shop"]
    assert [key.name for key in first.pods] == ["web"]
    await server.put(PODS, pod("db", ip="10.0.0.2"))
    await watched.pods_are("db", "web")
    await server.delete(PODS, "shop", "web")
    await watched.pods_are("db")
    assert watched.source.errors == ()


async def test_nothing_is_yielded_before_every_kind_has_been_listed(server: Server, watched: Watched) -> None:
    await server.put(PODS, pod("web"))
    server.fail("list", "/api/v1/services", *[status(503, "ServiceUnavailable")] * 4)
    watched.begin()
    await until(lambda: "nothing starts before this can be read" in watched.errors)
    assert watched.states == [] and watched.source.current.pods == {}
    await until(lambda: watched.states)
    await until(lambda: watched.source.errors == ())
    assert [key.name for key in watched.states[0].pods] == ["web"]


async def test_a_list_is_read_in_pages_and_taken_as_a_whole(server: Server, watched: Watched) -> None:
    for number in range(1234):
        await server.put(PODS, pod(f"web-{number:04}", ip=f"10.1.{number // 250}.{number % 250 + 1}"))
    first = await watched.start()
    assert len(first.pods) == 1234
    assert server.count("list", PODS) == 3


async def test_a_page_that_expired_while_the_list_was_read_makes_it_one_list(server: Server, watched: Watched) -> None:
    for number in range(600):
        await server.put(PODS, pod(f"web-{number:03}", ip=f"10.1.{number // 250}.{number % 250 + 1}"))

    async def second_page(request: object) -> object:
        return await status(410, "Expired")(request)  # type: ignore[arg-type]

    served = server._list

    async def first_page(request: object) -> object:
        server.fail("list", PODS, second_page)  # type: ignore[arg-type]
        return await served(request)  # type: ignore[arg-type]

    server.fail("list", PODS, first_page)  # type: ignore[arg-type]
    assert len((await watched.start()).pods) == 600


@pytest.mark.parametrize("compacted_as", ["HTTP status", "event"])
async def test_a_version_that_is_gone_costs_a_list_and_no_state_in_between(
    server: Server, watched: Watched, compacted_as: str
) -> None:
    await server.put(PODS, pod("web"))
    await server.put(PODS, pod("old", ip="10.0.0.2"))
    await watched.start()
    await until(lambda: server.count("watch", PODS) == 1)
    if compacted_as == "event":
        server.fail("watch", PODS, error_event(410, "Expired"))
    server.silent = True
    await server.delete(PODS, "shop", "old")
    await server.put(PODS, pod("new", ip="10.0.0.3"))
    if compacted_as == "HTTP status":
        server.compact()
    server.silent = False
    server.drop_watches()
    await watched.pods_are("new", "web")
    await until(lambda: len(watched.states) > 1)  # the watcher gets a state after the source has it
    assert [sorted(key.name for key in state.pods) for state in watched.states] == [["old", "web"], ["new", "web"]]


async def test_a_dropped_watch_goes_on_where_it_was_without_a_list(server: Server, watched: Watched) -> None:
    await server.put(PODS, pod("web"))
    await watched.start()
    for number in range(3):
        await until(lambda number=number: server.count("watch", PODS) == number + 1)
        server.drop_watches()
        await server.put(PODS, pod(f"web-{number}", ip=f"10.0.1.{number + 1}"))
        await until(lambda number=number: f"web-{number}" in watched.pods)
    assert server.count("list", PODS) == 1
    await until(lambda: watched.source.errors == ())


async def test_a_bookmark_moves_the_version_on(server: Server, watched: Watched) -> None:
    await server.put(PODS, pod("web"))
    await watched.start()
    await until(lambda: server.count("watch", PODS) == 1)
    await server.bookmark(PODS)
    await asyncio.sleep(0.1)
    server.compact()
    server.drop_watches()
    await until(lambda: server.count("watch", PODS) == 2)
    await server.put(PODS, pod("db", ip="10.0.0.2"))
    await watched.pods_are("db", "web")
    assert server.count("list", PODS) == 1


async def test_a_silent_watch_is_opened_again_and_is_no_error(server: Server, tmp_path: Path) -> None:
    api = Api(Access(server.kubeconfig(tmp_path)), dataclasses.replace(FAST, silence=0.3))
    watched = Watched(KubernetesSource(api, for_agent("node-a")))
    await server.put(PODS, pod("web"))
    await watched.start()
    server.silent = True
    await server.put(PODS, pod("db", ip="10.0.0.2"))
    await asyncio.sleep(0.1)
    assert watched.pods == ["web"]
    server.silent = False  # the open watch is not told: only a new one brings the event
    await watched.pods_are("db", "web")
    assert server.count("list", PODS) == 1 and watched.source.errors == ()
    await watched.stop()


PASSING: dict[str, Answer] = {
    "500": status(500, "InternalError"),
    "503": status(503, "ServiceUnavailable"),
    "reset": reset,
    "a proxy's page": garbage,
    "401": status(401, "Unauthorized"),
    "403": status(403, "Forbidden"),
    "404 of a kind that is always there": status(404, "NotFound"),
}


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize("verb", ["list", "watch"])
async def test_a_failure_is_reported_while_it_lasts_and_the_last_state_stands(
    server: Server, watched: Watched, name: str, verb: str
) -> None:
    await server.put(PODS, pod("web"))
    await watched.start()
    await until(lambda: server.count("watch", PODS) == 1)
    if verb == "list":
        await server.put(NAMESPACES, namespace("later"))
        server.compact()
    server.fail(verb, PODS, *[PASSING[name]] * 6)
    server.drop_watches()
    await until(lambda: f"{server.url}: Pod: GET {PODS}" in watched.errors)
    assert "the last state stands" in watched.errors
    assert watched.pods == ["web"]
    await server.put(PODS, pod("db", ip="10.0.0.2"))
    await watched.pods_are("db", "web")
    await until(lambda: watched.source.errors == ())
    assert all("web" in [key.name for key in state.pods] for state in watched.states)


async def test_a_refusal_names_its_cause_and_the_next_step(server: Server, watched: Watched) -> None:
    server.fail("list", PODS, *[status(403, "Forbidden")] * 50)
    watched.begin()
    await until(lambda: watched.errors)
    assert "403 Forbidden (scripted Forbidden)" in watched.errors
    assert "grant it by a Role or ClusterRole" in watched.errors


async def test_throttling_waits_as_long_as_the_server_asks(server: Server, watched: Watched) -> None:
    server.fail("list", PODS, status(429, "TooManyRequests", retry_after=1))
    began = time.monotonic()
    await watched.start()
    assert 1.0 <= time.monotonic() - began < 2.0


async def test_failures_in_a_row_are_slowed_down(server: Server, watched: Watched) -> None:
    server.fail("list", PODS, *[status(500, "InternalError")] * 1000)
    watched.begin()
    await asyncio.sleep(1)
    assert 3 <= server.count("list", PODS) <= 20


async def test_watches_that_end_at_once_are_slowed_down(server: Server, watched: Watched) -> None:
    async def ended(request: object) -> object:
        from aiohttp import web

        return web.Response()

    server.fail("watch", PODS, *[ended] * 1000)  # type: ignore[list-item]
    await watched.start()
    await asyncio.sleep(1)
    assert 3 <= server.count("watch", PODS) <= 20


async def test_a_kind_that_is_not_installed_is_empty_reported_and_tried_again(server: Server, watched: Watched) -> None:
    server.absent.add(POLICIES)
    first = await watched.start()
    assert first.authorization_policies == {}
    await until(lambda: "there are none until the kind is installed" in watched.errors)
    assert watched.source.blocking == ()
    server.absent.clear()
    await server.put(POLICIES, policy("deny", action="DENY"))
    await until(lambda: watched.source.current.authorization_policies)
    await until(lambda: watched.source.errors == ())


async def test_a_kind_that_vanishes_keeps_its_last_state(server: Server, watched: Watched) -> None:
    await server.put(POLICIES, policy("deny", action="DENY"))
    await watched.start()
    server.absent.add(POLICIES)
    server.compact()
    server.version += 1
    server.oldest = server.version
    server.drop_watches()
    await until(lambda: POLICIES in watched.errors)
    assert list(watched.source.current.authorization_policies) == [ObjectKey("shop", "deny")]


async def test_what_does_not_change_what_we_read_yields_no_state(server: Server, watched: Watched) -> None:
    await server.put(PODS, pod("web"))
    await watched.start()
    before = watched.source.current.pods[ObjectKey("shop", "web")]
    await server.put(
        PODS, {**pod("web"), "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}], "qosClass": "X"}}
    )
    await server.put(PODS, pod("db", ip="10.0.0.2"))
    await watched.pods_are("db", "web")
    # The source knows a state before whoever watches it has taken it.
    await until(lambda: len(watched.states) > 1)
    assert len(watched.states) == 2
    assert watched.source.current.pods[ObjectKey("shop", "web")] is before


async def test_a_burst_of_changes_arrives_in_few_states_and_soon(server: Server, watched: Watched) -> None:
    await watched.start()
    await until(lambda: server.count("watch", PODS) == 1)
    for number in range(300):
        await server.put(PODS, pod(f"web-{number:03}", ip=f"10.1.{number // 250}.{number % 250 + 1}"))
    began = time.monotonic()
    await until(lambda: len(watched.pods) == 300)
    assert time.monotonic() - began < 2.0
    assert len(watched.states) < 60


async def test_a_pod_made_anew_under_its_old_name_has_its_new_uid(server: Server, watched: Watched) -> None:
    await server.put(PODS, pod("web-0", uid="first"))
    await watched.start()
    await server.delete(PODS, "shop", "web-0")
    await server.put(PODS, pod("web-0", uid="second"))
    await until(lambda: watched.source.current.pods[ObjectKey("shop", "web-0")].metadata.uid == "second")


async def test_an_object_that_does_not_decode_is_named_and_the_others_go_on(server: Server, watched: Watched) -> None:
    await server.put(PODS, pod("web"))
    await server.put(PODS, pod("bad", ip="no address"))
    first = await watched.start()
    assert [key.name for key in first.pods] == ["web"]
    assert "Pod shop/bad: status.podIPs[0]" in watched.errors and "left out" in watched.errors
    await server.put(PODS, pod("bad", ip="10.0.0.2"))
    await watched.pods_are("bad", "web")
    await until(lambda: watched.source.errors == ())


async def test_an_object_that_becomes_undecodable_keeps_its_last_good_state(server: Server, watched: Watched) -> None:
    await server.put(PODS, pod("web", ip="10.0.0.7"))
    await watched.start()
    await server.put(PODS, pod("web", ip="no address"))
    await until(lambda: "what it was before stays in force" in watched.errors)
    server.compact()
    server.version += 1
    server.oldest = server.version
    server.drop_watches()
    await until(lambda: server.count("list", PODS) == 2)
    await server.put(PODS, pod("db", ip="10.0.0.8"))
    await watched.pods_are("db", "web")
    assert str(watched.source.current.pods[ObjectKey("shop", "web")].addresses[0]) == "10.0.0.7"
    await server.put(PODS, pod("web", uid="another", ip="no address"))
    await watched.pods_are("db")


async def test_explicit_nulls_are_absent_fields(server: Server, watched: Watched) -> None:
    nulls = pod("web", labels=None, annotations=None)
    nulls["spec"]["containers"] = None
    nulls["status"]["conditions"] = None
    await server.put(PODS, nulls)
    assert [key.name for key in (await watched.start()).pods] == ["web"]
    assert watched.source.errors == ()


async def test_kubectl_s_copy_of_the_object_is_not_kept(server: Server, watched: Watched) -> None:
    annotations = {"kubectl.kubernetes.io/last-applied-configuration": "x" * 1000, "own": "y"}
    await server.put(PODS, pod("web", annotations=annotations))
    (kept,) = (await watched.start()).pods.values()
    assert kept.metadata.annotations == {"own": "y"}


async def test_the_agent_sees_the_pods_of_its_node_only(server: Server, api: Api) -> None:
    await server.put(PODS, pod("mine"))
    await server.put(PODS, pod("other", node="node-b", ip="10.0.0.2"))
    watched = Watched(KubernetesSource(api, for_agent("node-a")))
    await watched.start()
    await server.put(PODS, pod("other-2", node="node-b", ip="10.0.0.3"))
    await server.put(PODS, pod("mine-2", ip="10.0.0.4"))
    await watched.pods_are("mine", "mine-2")
    assert {seen.path for seen in server.seen} == {PODS, NAMESPACES}
    await watched.stop()


async def test_two_watchers_see_the_same_and_the_last_one_ends_the_requests(server: Server, api: Api) -> None:
    source = KubernetesSource(api, for_agent("node-a"))
    one, two = Watched(source), Watched(source)
    await server.put(PODS, pod("web"))
    await one.start()
    await two.start()
    await one.stop()
    await server.put(PODS, pod("db", ip="10.0.0.2"))
    await until(lambda: two.states[-1] == source.current and len(source.current.pods) == 2)
    await two.stop()
    await until(lambda: not server._watches)
    three = Watched(source)
    assert len((await three.start()).pods) == 2
    assert server.count("list", PODS) == 1
    await three.stop()


async def test_credentials_that_were_replaced_in_the_kubeconfig_are_read_again(
    server: Server, watched: Watched, tmp_path: Path
) -> None:
    await watched.start()
    server.token = "rotated"
    server.kubeconfig(tmp_path)
    server.drop_watches()
    await server.put(PODS, pod("web"))
    await watched.pods_are("web")
