"""The first process of a pod that shares its process namespace; no other pod has one."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from undermesh.lab.runtime import oci, records, shimmed
from undermesh.lab.runtime.images import Images
from undermesh.lab.runtime.shimclient import ShimClient
from undermesh.lab.runtime.types import ContainerConfig, Resources, RuntimeFault, Security

# A signal that is ignored stays so over exec, and children of who ignores SIGCHLD leave no zombies.
_COMMAND = ("/usr/bin/env", "--ignore-signal=CHLD", "sleep", "infinity")
_CONFIG = ContainerConfig(
    name="pause",
    attempt=0,
    image="registry.k8s.io/pause",
    command=_COMMAND,
    security=Security(drop_capabilities=("ALL",), allow_privilege_escalation=False),
    resources=Resources(oom_score_adj=-998),
)
_PATIENCE = 5.0


class Pause:
    """Starts and stops them; each is a container of the shim with the sandbox's id."""

    def __init__(self, run: Path, shim: ShimClient, images: Images, facts: oci.NodeFacts) -> None:
        self._run = run
        self._shim = shim
        self._images = images
        self._facts = facts

    def namespace(self, sandbox: str) -> str:
        """The path of the process namespace. Raises RuntimeFault: its first process is not there."""
        try:
            started = json.loads((self._directory(sandbox) / shimmed.STARTED).read_bytes())
        except FileNotFoundError as error:
            raise RuntimeFault("CreateContainerError", f"sandbox {sandbox[:12]}: no first process") from error
        return f"/proc/{started['pid']}/ns/pid"

    async def start(self, sandbox: records.Sandbox, namespaces: Mapping[str, str]) -> None:
        """Raises RuntimeFault, OSError."""
        directory = self._directory(sandbox.id)
        for layer in ("upper", "work", "rootfs"):
            (directory / layer).mkdir(parents=True)
        lower, _ = await asyncio.to_thread(self._images.layers, _CONFIG.image)
        cgroup = f"{sandbox.config.cgroup_parent}/cri-containerd-{sandbox.id}.scope"
        place = oci.Placement(
            root=str(directory / "rootfs"),
            cgroups_path=f"/{cgroup}",
            hostname=sandbox.config.hostname,
            namespaces={"mount": "", "pid": "", **namespaces},
        )
        spec = oci.spec(_CONFIG, self._images.resolve(_CONFIG), place, self._facts)
        spec["mounts"].append({"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]})
        (directory / "config.json").write_text(json.dumps(spec))
        overlay = f"lowerdir={':'.join(map(str, lower))},upperdir={directory}/upper,workdir={directory}/work"
        request = {"op": "start", "id": sandbox.id, "cgroup": f"/sys/fs/cgroup/{cgroup}", "log": "/dev/null"}
        answer = await self._shim.ask(
            {**request, "overlay": overlay, "stdin": False, "tty": False, "privileged": False}
        )
        if "error" in answer:
            raise RuntimeFault("FailedCreatePodSandBox", f"pause: {answer['error']}")

    async def stop(self, sandbox: str) -> None:
        """Kill it and remove its files; nothing happens if there is none."""
        directory = self._directory(sandbox)
        if not directory.exists():
            return
        spec = json.loads((directory / "config.json").read_bytes())
        shimmed.kill_cgroup(f"/sys/fs/cgroup{spec['linux']['cgroupsPath']}")
        for _ in range(int(_PATIENCE / 0.01)):
            if (directory / shimmed.EXITED).exists() or not (directory / shimmed.STARTED).exists():
                break
            await asyncio.sleep(0.01)
        shutil.rmtree(directory, ignore_errors=True)

    def _directory(self, sandbox: str) -> Path:
        return self._run / "containers" / sandbox
