"""The archive has what the agent says, and no secret."""

import json
import tarfile
from pathlib import Path

import pytest
from agent_stand_in import Command, recorded, serving
from aiohttp import web

from undermesh.cli.bug_report import ASKED
from undermesh.cli.secrets_removed import without_secrets

KEY = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\nAgEGCCqGSM49\n-----END PRIVATE KEY-----\n"
TOKEN = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2lnbmF0dXJl"


def contents(archive: Path) -> dict[str, object]:
    """The documents of an archive."""
    with tarfile.open(archive) as opened:
        found = {}
        for member in opened.getmembers():
            file = opened.extractfile(member)
            assert file is not None
            found[Path(member.name).stem] = json.loads(file.read())
        return found


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"before {KEY} after", "before [removed: private key]\n after"),
        (json.dumps({"a": KEY, "b": 1}), '{"a": "[removed: private key]\\n", "b": 1}'),
        ("-----BEGIN EC PRIVATE KEY-----\nMHcCAQ", "[removed: private key]"),
        (f"token={TOKEN},", "token=[removed: token],"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer [removed: token]"),
        ("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----", None),
        ("spiffe://cluster.local/ns/shop/sa/web at 10.0.0.1:80", None),
    ],
)
def test_secrets_are_replaced_and_nothing_else(text: str, left: str | None) -> None:
    assert without_secrets(text) == (text if left is None else left)


async def test_the_archive_has_every_answer_and_the_secrets_in_them_are_gone(
    undermesh: Command, run_dir: Path, tmp_path: Path
) -> None:
    status = {"error": f"refused: {KEY}", "header": f"Bearer {TOKEN}"}
    answers = {"/v1/status": web.json_response(status), "/v1/policies": web.json_response(recorded("policies"))}
    archive = tmp_path / "report.tar.gz"
    async with serving(run_dir / "agent.sock", answers):
        result = await undermesh("bug-report", "--file", str(archive))
    assert (result.code, result.err) == (0, "")
    assert archive.stat().st_mode & 0o777 == 0o600
    found = contents(archive)
    assert set(found) == {"machine", *ASKED}
    assert found["policies"] == recorded("policies")
    assert found["status"] == {
        "error": "refused: [removed: private key]\n",
        "header": "Bearer [removed: token]",
    }
    assert "HTTP status 404" in str(found["bpf"])


async def test_without_an_agent_the_archive_says_so(undermesh: Command, tmp_path: Path) -> None:
    archive = tmp_path / "report.tar.gz"
    assert (await undermesh("bug-report", "--file", str(archive))).code == 0
    assert "no agent socket" in str(contents(archive)["status"])


async def test_a_file_that_is_there_is_not_overwritten(undermesh: Command, tmp_path: Path) -> None:
    archive = tmp_path / "report.tar.gz"
    archive.write_text("mine")
    result = await undermesh("bug-report", "--file", str(archive))
    assert (result.code, archive.read_text()) == (1, "mine")
    assert "--file" in result.err
