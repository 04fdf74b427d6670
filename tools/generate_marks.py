"""Writes the marks table (proto/marks.toml) as a C header and as a Python module.

ztunnel's build script reads the same table. Usage: generate_marks.py TABLE HEADER MODULE
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main(table: Path, header: Path, module: Path) -> None:
    marks = tomllib.loads(table.read_text())["mark"]
    c = ["/* Generated from proto/marks.toml. */", "#pragma once"]
    py = ['"""Socket marks, generated from proto/marks.toml."""', "", "from typing import Final", ""]
    for mark in marks:
        name, value = mark["name"], mark["value"]
        c.append(f"#define MARK_{name} {value:#x} /* {mark['meaning']}; set by {mark['set_by']} */")
        py.append(f"{name}: Final = {value:#x}  # {mark['meaning']}; set by {mark['set_by']}")
    py += ["", "ALL: Final = {"]
    py += [f'    "{mark["name"]}": {mark["name"]},' for mark in marks]
    py += ["}"]
    for path, lines in ((header, c), (module, py)):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(lines) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
