"""The archive of a real node holds none of the keys and tokens that the node has."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile

import pytest

pytestmark = pytest.mark.usefixtures("mesh")
NODE = "node1"
ENOUGH = 24
"""Characters of base64 that nothing else shares by chance."""


def test_no_key_of_the_node_is_in_it(cluster, tmp_path) -> None:
    run_dir, archive = cluster.nodes[NODE].run_dir, tmp_path / "report.tar.gz"
    done = subprocess.run(
        [sys.executable, "-m", "undermesh.cli", "--run-dir", str(run_dir), "bug-report", "--file", str(archive)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done
    with tarfile.open(archive) as opened:
        files = [opened.extractfile(member) for member in opened.getmembers()]
        text = "".join(file.read().decode() for file in files if file is not None)
    assert "mesh/client" in text or '"client"' in text
    held = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file()).decode(errors="replace")
    keys = re.findall(r"PRIVATE KEY-----(.*?)-----END", held, re.DOTALL)
    assert keys, f"no key below {run_dir}: this test looks at nothing"
    for key in keys:
        lines = [line for line in re.split(r"\\n|\s", key) if len(line) >= ENOUGH]
        assert lines
        assert not [line for line in lines if line[:ENOUGH] in text]
