"""The chart as tests read it: rendered by helm with its own values."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from undermesh.lab.build import Build
from undermesh.lab.kube import programs

TOP = Path(__file__).parents[2]
CHART = TOP / "daemonset/chart"
LAUNCHERS = TOP / "daemonset/images/bin"

Object = dict[str, Any]


@cache
def helm() -> Path:
    return programs.find("helm", Build.of_this_package().root)


def template(*options: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as home:
        return subprocess.run(
            [helm(), "template", "undermesh", CHART, *options],
            capture_output=True,
            text=True,
            check=False,
            env={"HOME": home, "PATH": ""},
        )


@cache
def rendered(*options: str) -> str:
    """What `helm install` sends, definitions included; with options of `helm template`."""
    done = template("--include-crds", "--no-hooks", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def hooks() -> tuple[Object, ...]:
    """What `helm uninstall` makes first."""
    done = template()
    assert done.returncode == 0, done.stderr
    made = [obj for obj in yaml.safe_load_all(done.stdout) if obj is not None]
    return tuple(obj for obj in made if "helm.sh/hook" in obj["metadata"].get("annotations", {}))


@cache
def _objects(*options: str) -> tuple[Object, ...]:
    return tuple(obj for obj in yaml.safe_load_all(rendered(*options)) if obj is not None)


def objects(*options: str) -> list[Object]:
    return list(_objects(*options))


def the(kind: str, name: str, *options: str) -> Object:
    return next(obj for obj in objects(*options) if obj["kind"] == kind and obj["metadata"]["name"] == name)


def container(pod: Object, name: str) -> Object:
    found: Object = next(c for c in pod["containers"] if c["name"] == name)
    return found


def node_pod(*options: str) -> Object:
    found: Object = the("DaemonSet", "undermesh-node", *options)["spec"]["template"]["spec"]
    return found


def controlplane_pod(*options: str) -> Object:
    found: Object = the("Deployment", "undermesh", *options)["spec"]["template"]["spec"]
    return found


def uninstall_text(*options: str) -> str:
    """The DaemonSet that `undermesh uninstall` puts onto the nodes."""
    found: str = the("ConfigMap", "undermesh-uninstall", *options)["data"]["daemonset.yaml"]
    return found


def uninstall_pod(*options: str) -> Object:
    found: Object = yaml.safe_load(uninstall_text(*options))["spec"]["template"]["spec"]
    return found


def uninstaller() -> Object:
    return next(c for c in uninstall_pod()["initContainers"] if c["name"] == "uninstall")
