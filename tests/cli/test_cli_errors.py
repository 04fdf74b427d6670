"""What a user reads when the agent cannot be asked: one line with the cause and the next step, exit status 1."""

import asyncio
import json
import os
import socket
from pathlib import Path

import pytest
from agent_stand_in import Command, Result, serving
from aiohttp import web

from undermesh.cli.answers import Status
from undermesh.cli.client import AgentClient
from undermesh.cli.errors import CliError
from undermesh.cli.main import main

FROM_AGENT = sorted(
    set(main.verbs) - {"authz", "bug-report", "check", "completion", "explain", "lab", "roots", "uninstall", "ztunnel"}
)


def assert_one_line(result: Result, *texts: str) -> None:
    """The command failed, printed nothing but one error line, and that holds every text."""
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("Error: ")
    assert len(result.err.splitlines()) == 1
    for text in texts:
        assert text in result.err


@pytest.mark.parametrize("verb", FROM_AGENT)
async def test_no_socket_names_the_path_and_the_option(undermesh: Command, run_dir: Path, verb: str) -> None:
    assert_one_line(await undermesh(verb), f"no agent socket at {run_dir}/agent.sock", "--run-dir")


async def test_a_socket_that_nobody_listens_on_says_that_the_agent_has_stopped(
    undermesh: Command, run_dir: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(run_dir / "agent.sock"))
    assert_one_line(await undermesh("status"), f"nobody listens on {run_dir}/agent.sock", "start it again")


async def test_a_file_that_is_no_socket_is_named_as_such(undermesh: Command, run_dir: Path) -> None:
    (run_dir / "agent.sock").write_text("")
    assert_one_line(await undermesh("status"), "is not a socket", "--run-dir")


async def test_a_run_directory_that_is_too_long_for_a_socket_is_one_line(undermesh: Command) -> None:
    assert_one_line(await undermesh("--run-dir", "/tmp/" + "x" * 200, "status"), "cannot use /tmp/xxx", "too long")


@pytest.mark.root
def test_permission_denied_says_to_run_as_root(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run_dir / "agent.sock"))
        listener.listen()
        (run_dir / "agent.sock").chmod(0o600)
        run_dir.chmod(0o755)
        text = error_as_nobody(run_dir)
    assert text == f"permission denied on {run_dir}/agent.sock: run as root, the socket is root's only"


def error_as_nobody(run_dir: Path) -> str:
    """What the client raises in a process without rights; a fork, which can read the checkout wherever it is."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setuid(65534)
            AgentClient(run_dir).get("/v1/status", Status)
        except CliError as error:
            os.write(writer, error.message.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as errors:
        text = errors.read()
    os.waitpid(child, 0)
    return text


REFUSALS = [
    pytest.param(
        web.json_response({"error": "ztunnel is not connected:\nsee its log"}, status=503),
        "the agent cannot answer /v1/connections: ztunnel is not connected: see its log",
        id="503 with a reason",
    ),
    pytest.param(web.Response(status=503, text="<html>"), "HTTP status 503 without a reason", id="503 without"),
    pytest.param(web.Response(status=404), "HTTP status 404", id="404"),
    pytest.param(web.json_response([1], status=500), "HTTP status 500", id="500 that is no object"),
    pytest.param(web.Response(text="hello"), "something else than this version expects", id="no JSON"),
    pytest.param(web.json_response({}), "`connections`", id="field missing"),
    pytest.param(web.json_response({"connections": [7]}), "`$.connections[0]`", id="wrong type"),
    pytest.param(web.Response(body=b"\xff\xfe"), "something else", id="no UTF-8"),
]


@pytest.mark.parametrize(("answer", "text"), REFUSALS)
@pytest.mark.parametrize("form", ["table", "json"])
async def test_an_answer_that_is_none_is_explained(
    undermesh: Command, run_dir: Path, answer: web.Response, text: str, form: str
) -> None:
    fresh = web.Response(status=answer.status, body=answer.body, headers={"Content-Type": answer.content_type})
    async with serving(run_dir / "agent.sock", {"/v1/connections": fresh}):
        assert_one_line(await undermesh("connections", "-o", form), text)


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\x00\x01\x02 not http\r\n\r\n", id="bytes"),
        pytest.param(b"", id="closed at once"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", id="cut off"),
    ],
)
async def test_a_server_that_does_not_speak_http_is_named(undermesh: Command, run_dir: Path, garbage: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(garbage)
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(talk, run_dir / "agent.sock")
    async with server:
        assert_one_line(await undermesh("status"), f"{run_dir}/agent.sock does not answer as an agent")


async def test_check_fails_when_the_agent_cannot_answer(undermesh: Command, run_dir: Path) -> None:
    refusal = web.json_response({"error": "starting"}, status=503)
    async with serving(run_dir / "agent.sock", {"/v1/check": refusal}):
        result = await undermesh("check", "-o", "json")
    assert result.code == 1
    rows = {check["name"]: check for check in json.loads(result.out)["checks"]}
    assert rows["agent"]["ok"] is False
    assert "starting" in rows["agent"]["detail"]


async def test_check_fails_when_a_check_of_the_agents_failed(undermesh: Command, run_dir: Path) -> None:
    failed = {"name": "links", "ok": False, "detail": "connect4 is not attached", "next_step": "restart the agent"}
    async with serving(run_dir / "agent.sock", {"/v1/check": web.json_response({"checks": [failed]})}):
        result = await undermesh("check")
    assert result.code == 1
    assert any(
        all(word in line for word in ("agent: links", "FAIL", "not attached", "restart the agent"))
        for line in result.out.splitlines()
    ), result.out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        pytest.param(("status", "-o", "xml"), "'xml' is not one of 'table', 'wide', 'json', 'yaml'", id="output form"),
        pytest.param(("status", "--wide"), "--wide", id="flag"),
        pytest.param(("statsu",), "No such command 'statsu'", id="verb"),
        pytest.param(("status", "pod"), "Got unexpected extra argument", id="argument"),
    ],
)
async def test_a_wrong_command_line_is_named_and_exits_with_2(
    undermesh: Command, arguments: tuple[str, ...], text: str
) -> None:
    result = await undermesh(*arguments)
    assert result.code == 2
    assert text in result.err


async def test_control_characters_of_an_answer_do_not_reach_the_terminal(undermesh: Command, run_dir: Path) -> None:
    policy = {"name": "shop/\x1b[2Jx[red]", "action": "DENY"}
    async with serving(run_dir / "agent.sock", {"/v1/policies": web.json_response({"policies": [policy]})}):
        result = await undermesh("policies")
    assert "\x1b" not in result.out
    assert "shop/\N{REPLACEMENT CHARACTER}[2Jx[red]" in result.out
