from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from undermesh.api.source_option import SourceOption, source_option

READ = {
    "kubernetes": SourceOption("kubernetes", None),
    "kubernetes:/etc/kubeconfig": SourceOption("kubernetes", Path("/etc/kubeconfig")),
    "files:/srv/objects": SourceOption("files", Path("/srv/objects")),
    "/srv/objects": SourceOption("files", Path("/srv/objects")),
    "./kubernetes": SourceOption("files", Path("kubernetes")),
    "/srv/a:b": SourceOption("files", Path("/srv/a:b")),
    "files": SourceOption("files", Path("files")),
}


@pytest.mark.parametrize("text", READ)
def test_a_source_is_read_from_its_option(text: str) -> None:
    assert source_option(text) == READ[text]


@pytest.mark.parametrize("text", ["", "files:", "kubernetes:"])
def test_a_source_without_a_place_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError):
        source_option(text)
