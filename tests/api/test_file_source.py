import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from undermesh.api.files import FileSource
from undermesh.api.objects import Objects
from undermesh.api.problems import InputError
from undermesh.api.source import Source

POLL = 0.03
QUIET = 0.4


def pod(name: str, label: str = "x") -> str:
    return (
        "apiVersion: v1\nkind: Pod\n"
        f"metadata: {{name: {name}, namespace: shop, uid: uid-{name}, labels: {{app: {label}}}}}\n"
    )


def names(objects: Objects) -> list[str]:
    return [key.name for key in objects.pods]


def replace(path: Path, text: str) -> None:
    """As a careful writer does it: a finished file takes the name."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


async def following(states: AsyncIterator[Objects]) -> Objects:
    return await asyncio.wait_for(anext(states), 10)


async def nothing_follows(source: FileSource) -> None:
    """No new state appears within a dozen polls."""
    before = source.current
    await asyncio.sleep(QUIET)
    source.refresh()
    assert source.current is before


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    (tmp_path / "a.yaml").write_text(pod("a"))
    return FileSource(tmp_path, poll_seconds=POLL)


@contextlib.asynccontextmanager
async def polled(source: FileSource) -> AsyncIterator[asyncio.Queue[Objects]]:
    """Every state that the source yields, in order."""
    states: asyncio.Queue[Objects] = asyncio.Queue()

    async def pump() -> None:
        async for state in source.watch():
            states.put_nowait(state)

    task = asyncio.create_task(pump())
    try:
        yield states
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_all_documents_of_all_files_make_the_first_state(source: FileSource, tmp_path: Path) -> None:
    (tmp_path / "b.yml").write_text(pod("b") + "---\n" + pod("c"))
    (tmp_path / "list.yaml").write_text("kind: List\nitems:\n- {kind: Node, apiVersion: v1, metadata: {name: n1}}")
    (tmp_path / ".hidden.yaml").write_text(pod("h"))
    (tmp_path / "notes.txt").write_text("no: [yaml")
    typed: Source = source
    state = await following(typed.watch())
    assert names(state) == ["a", "b", "c"]
    assert list(state.nodes) == ["n1"]
    assert state == source.current
    assert source.errors == ()


async def test_an_empty_directory_is_a_state_too(tmp_path: Path) -> None:
    assert await following(FileSource(tmp_path, poll_seconds=POLL).watch()) == Objects()


def test_a_missing_directory_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: cannot list the directory .*: create it, or name another"):
        FileSource(tmp_path / "absent")


async def test_a_replaced_file_gives_the_next_state(source: FileSource, tmp_path: Path) -> None:
    states = source.watch()
    await following(states)
    replace(tmp_path / "a.yaml", pod("a2"))
    assert names(await following(states)) == ["a2"]


async def test_a_replacement_of_equal_size_and_time_is_seen_by_its_inode(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(pod("a"))
    os.utime(path, ns=(1, 1))
    source = FileSource(tmp_path, poll_seconds=POLL)
    states = source.watch()
    await following(states)
    fresh = tmp_path / "fresh"
    fresh.write_text(pod("b"))
    os.utime(fresh, ns=(1, 1))
    fresh.rename(path)
    assert names(await following(states)) == ["b"]


async def test_a_new_file_adds_and_a_deleted_file_removes(source: FileSource, tmp_path: Path) -> None:
    states = source.watch()
    await following(states)
    (tmp_path / "b.yaml").write_text(pod("b"))
    assert names(await following(states)) == ["a", "b"]
    (tmp_path / "a.yaml").unlink()
    assert names(await following(states)) == ["b"]


async def test_a_rewrite_that_changes_nothing_gives_no_state(source: FileSource, tmp_path: Path) -> None:
    states = source.watch()
    await following(states)
    replace(tmp_path / "a.yaml", "# a comment\n" + pod("a"))
    await nothing_follows(source)


BROKEN = [
    ("YAML", "a: [", "a.yaml: document 1: no valid YAML at line 2"),
    ("field", pod("a") + "spec: {hostNetwork: maybe}", "a.yaml: document 1: Pod shop/a: spec.hostNetwork: expected"),
    ("kind", pod("a").replace("Pod", "Pot"), "a.yaml: document 1: Pot shop/a: kind: unknown kind"),
    ("second document", pod("a", "new") + "---\n{}", "a.yaml: document 2: object: kind: expected the name"),
    ("nothing", "", "a.yaml: holds no object"),
    ("encoding", "\udcff", "a.yaml: document 1: no valid YAML: byte 1 is no UTF-8"),
    ("same pod twice", pod("a") + "---\n" + pod("a"), "a.yaml: document 2: Pod shop/a: stands in a.yaml document 1"),
]


@pytest.mark.parametrize(("text", "message"), [pytest.param(t, m, id=i) for i, t, m in BROKEN])
async def test_a_broken_file_keeps_its_last_good_state_until_the_fix_appears(
    source: FileSource, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, message: str
) -> None:
    caplog.set_level(logging.INFO, "undermesh.api.files")
    async with polled(source) as states:
        good = await states.get()
        path = tmp_path / "a.yaml"
        fresh = tmp_path / "fresh"
        fresh.write_bytes(text.encode(errors="surrogateescape"))
        fresh.rename(path)
        (tmp_path / "b.yaml").write_text(pod("b"))
        assert names(await asyncio.wait_for(states.get(), 10)) == ["a", "b"]
        assert source.current.pods[next(iter(good.pods))] == next(iter(good.pods.values()))
        assert [str(error)[: len(message)] for error in source.errors] == [message]
        await asyncio.sleep(QUIET)
        logged = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(logged) == 1, "the problem is logged once, not at each poll"
        replace(path, pod("a", "fixed"))
        state = await asyncio.wait_for(states.get(), 10)
        assert next(iter(state.pods.values())).metadata.labels == {"app": "fixed"}
        assert source.errors == ()
        assert "a.yaml: in order again" in caplog.text


async def test_a_file_that_is_broken_from_the_start_does_not_hold_up_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_text(pod("b"))
    source = FileSource(tmp_path, poll_seconds=POLL)
    assert names(await following(source.watch())) == ["b"]
    assert [error.file for error in source.errors] == ["a.yaml"]


async def test_objects_that_two_files_define_are_an_error_that_names_both(source: FileSource, tmp_path: Path) -> None:
    states = source.watch()
    await following(states)
    (tmp_path / "b.yaml").write_text(pod("b") + "---\n" + pod("a", "other"))
    await asyncio.sleep(QUIET)
    source.refresh()
    assert "b.yaml: document 2: Pod shop/a: stands in a.yaml document 1 too" in str(source.errors[0])
    assert names(source.current) == ["a"]
    (tmp_path / "a.yaml").unlink()
    assert names(await following(states)) == ["a", "b"]
    assert source.errors == ()


async def test_a_file_is_not_read_while_it_is_being_written(source: FileSource, tmp_path: Path) -> None:
    async with polled(source) as states:
        await states.get()
        with (tmp_path / "a.yaml").open("w") as writer:
            for number in range(8):
                writer.write(f"---\n{pod(f'p{number}')}")
                writer.flush()
                await asyncio.sleep(POLL / 2)
        assert len((await asyncio.wait_for(states.get(), 10)).pods) == 8


def test_a_file_that_never_rests_does_not_keep_others_away_for_long(tmp_path: Path) -> None:
    source = FileSource(tmp_path, poll_seconds=60)
    (tmp_path / "b.yaml").write_text(pod("b"))
    polls = 0
    while not names(source.current) and polls < 30:
        polls += 1
        (tmp_path / "restless.yaml").write_text("#" * polls + "\n" + pod("r"))
        source.refresh()
    assert names(source.current) == ["b"]
    assert polls == 10


async def test_an_editor_that_deletes_and_writes_anew_never_shows_the_file_as_gone(
    source: FileSource, tmp_path: Path
) -> None:
    async with polled(source) as states:
        await states.get()
        path = tmp_path / "a.yaml"
        for number in range(5):
            path.unlink()
            await asyncio.sleep(POLL / 3)
            path.write_text(pod("a", f"v{number}"))
            await asyncio.sleep(POLL * 5)
        await asyncio.sleep(QUIET)
        seen = [states.get_nowait() for _ in range(states.qsize())]
        assert seen
        assert all(names(state) == ["a"] for state in seen)


async def test_a_renamed_file_keeps_its_objects_throughout(source: FileSource, tmp_path: Path) -> None:
    async with polled(source) as states:
        await states.get()
        (tmp_path / "a.yaml").rename(tmp_path / "z.yaml")
        await asyncio.sleep(QUIET)
        assert states.empty()
        assert names(source.current) == ["a"]
        assert source.errors == ()


async def test_links_into_a_swapped_directory_are_followed(tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "a.yaml").write_text(pod(version))
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "..data").symlink_to("../v1")
    (mount / "a.yaml").symlink_to("..data/a.yaml")
    states = FileSource(mount, poll_seconds=POLL).watch()
    assert names(await following(states)) == ["v1"]
    (mount / "..new").symlink_to("../v2")
    (mount / "..new").rename(mount / "..data")
    assert names(await following(states)) == ["v2"]


async def test_a_link_to_nowhere_is_a_problem_of_that_file_alone(source: FileSource, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").symlink_to("nowhere")
    assert names(await following(source.watch())) == ["a"]
    assert "b.yaml: cannot be read (No such file or directory)" in str(source.errors[0])


async def test_a_directory_that_vanishes_leaves_the_last_state_in_force(source: FileSource, tmp_path: Path) -> None:
    states = source.watch()
    await following(states)
    away = tmp_path.with_name(tmp_path.name + "-away")
    tmp_path.rename(away)
    try:
        await nothing_follows(source)
        assert names(source.current) == ["a"]
        assert "cannot list the directory" in str(source.errors[0])
    finally:
        away.rename(tmp_path)
    await nothing_follows(source)
    assert source.errors == ()


async def test_two_watchers_both_see_the_last_state(source: FileSource, tmp_path: Path) -> None:
    first, second = source.watch(), source.watch()
    await following(first)
    await following(second)
    replace(tmp_path / "a.yaml", pod("a2"))
    assert names(await following(first)) == names(await following(second)) == ["a2"]


async def test_waiting_for_changes_costs_next_to_nothing(source: FileSource, tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"p{number}.yaml").write_text(pod(f"p{number}"))
    idle = FileSource(tmp_path)
    async with polled(idle) as states:
        await asyncio.wait_for(states.get(), 10)
        before = time.process_time()
        await asyncio.sleep(1.0)
        assert time.process_time() - before < 0.2


def test_load_reads_a_fresh_file_at_once(source: FileSource) -> None:
    assert names(source.load()) == ["a"]
