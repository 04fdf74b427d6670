"""Containers on a real node: what is in them and what is not, how they end, what they leave."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest
from onnode import OnNode, container, ended, output, pod, script, start, status

from undermesh.lab.runtime.node import NodeRuntime
from undermesh.lab.runtime.types import ContainerState, Mount, Resources, RuntimeFault, Security

pytestmark = pytest.mark.root

HOST = pod("host", host_network=True)  # no CNI: these tests are not about networks


def _capabilities(lines: list[str]) -> int:
    return int(next(line.split()[1] for line in lines if line.startswith("CapEff")), 16)


def _bit(mask: int, bit: int) -> bool:
    return bool(mask >> bit & 1)


NET_ADMIN, CHOWN, NET_BIND_SERVICE, SYS_ADMIN = 12, 0, 10, 21


@pytest.mark.parametrize(
    ("security", "present", "absent"),
    [
        pytest.param(Security(), {CHOWN, NET_BIND_SERVICE}, {NET_ADMIN, SYS_ADMIN}, id="default"),
        pytest.param(Security(drop_capabilities=("ALL",)), set(), set(range(41)), id="drop-all"),
        pytest.param(
            Security(drop_capabilities=("ALL",), add_capabilities=("NET_ADMIN",)),
            {NET_ADMIN},
            set(range(41)) - {NET_ADMIN},
            id="drop-all-add-one",
        ),
        pytest.param(Security(privileged=True), {CHOWN, NET_ADMIN, SYS_ADMIN}, set(), id="privileged"),
    ],
)
def test_a_capability_that_is_not_declared_is_not_there(
    node: OnNode, security: Security, present: set[int], absent: set[int]
) -> None:
    async def body(runtime: NodeRuntime) -> list[str]:
        sandbox = await runtime.run_sandbox(HOST)
        return await output(runtime, sandbox.id, script("cat /proc/self/status", security=security))

    mask = _capabilities(node.run(body))
    assert all(_bit(mask, bit) for bit in present) and not any(_bit(mask, bit) for bit in absent)


def test_a_path_of_the_node_is_there_only_if_it_is_mounted(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[list[str], list[str]]:
        sandbox = await runtime.run_sandbox(HOST)
        Path("/run/secret-of-the-node").mkdir()
        Path("/run/secret-of-the-node/x").write_text("here\n")
        look = "ls /work /run/secret-of-the-node /etc/cni 2>/dev/null; echo end"
        mount = Mount("/run/secret-of-the-node", "/mnt/seen", read_only=True)
        without = await output(runtime, sandbox.id, script(look))
        touch = "cat /mnt/seen/x; touch /mnt/seen/y 2>/dev/null || echo refused"
        return without, await output(runtime, sandbox.id, script(touch, mounts=(mount,)))

    assert node.run(body) == (["end"], ["here", "refused"])


def test_processes_of_the_node_are_seen_only_with_hostpid(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[list[str], list[str]]:
        own = await runtime.run_sandbox(HOST)
        shared = await runtime.run_sandbox(pod("hostpid", host_network=True, host_pid=True))
        look = script("echo $$; ls -d /proc/[0-9]* | wc -l")
        return await output(runtime, own.id, look), await output(runtime, shared.id, script("echo $$"))

    alone, among_all = node.run(body)
    assert alone[0] == "1" and int(alone[1]) <= 4
    assert int(among_all[0]) > 1


def test_exit_codes_tell_how_a_container_ended(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> list[tuple[int, str]]:
        sandbox = await runtime.run_sandbox(HOST)
        good = await start(runtime, sandbox.id, script("exit 0"))
        bad = await start(runtime, sandbox.id, script("exit 3"))
        stubborn = await start(runtime, sandbox.id, script("trap '' TERM; while :; do sleep 1; done"))
        # A shared process namespace makes it no PID 1, so SIGTERM needs no handler.
        shared = await runtime.run_sandbox(pod("shared", host_network=True, share_process_namespace=True))
        obedient = await start(runtime, shared.id, container("sleep", "100"))
        await runtime.stop_container(stubborn, 0.2)
        await runtime.stop_container(obedient, 5)
        found = [await ended(runtime, name) for name in (good, bad, stubborn, obedient)]
        return [(one.exit_code, one.reason) for one in found]

    assert node.run(body) == [(0, "Completed"), (3, "Error"), (137, "Error"), (143, "Error")]


def test_the_log_has_both_streams_in_cri_format(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> str:
        sandbox = await runtime.run_sandbox(HOST)
        config = script("echo one; sleep 0.1; echo two >&2; sleep 0.1; printf three")
        await ended(runtime, await start(runtime, sandbox.id, config))
        return config.log_path.read_text()

    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z"
    assert re.fullmatch(rf"{stamp} stdout F one\n{stamp} stderr F two\n{stamp} stdout P three\n", node.run(body))


def test_a_root_is_writable_unless_it_is_declared_read_only_and_never_the_machines(node: OnNode) -> None:
    write = "echo x > /etc/new && echo y > /usr/local/bin/undermesh-test && echo written || echo refused"

    async def body(runtime: NodeRuntime) -> list[list[str]]:
        sandbox = await runtime.run_sandbox(HOST)
        results = [await output(runtime, sandbox.id, script(write))]
        results.append(await output(runtime, sandbox.id, script("ls /etc/new /usr/local/bin/undermesh-test; echo end")))
        read_only = script(write, security=Security(read_only_root=True))
        return [*results, await output(runtime, sandbox.id, read_only)]

    first, second, third = node.run(body)
    assert first == ["written"] and sorted(second)[0] == "end" and len(second) == 3 and "refused" in third
    assert not Path("/usr/local/bin/undermesh-test").exists()


def test_user_and_groups_and_no_new_privileges_are_as_declared(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> list[str]:
        sandbox = await runtime.run_sandbox(HOST)
        security = Security(1000, 2000, (3000,), allow_privilege_escalation=False)
        return await output(
            runtime, sandbox.id, script("id -u; id -g; id -G; grep NoNewPrivs /proc/self/status", security=security)
        )

    assert node.run(body) == ["1000", "2000", "2000 3000", "NoNewPrivs:\t1"]


def test_what_a_container_must_not_see_of_the_kernel_is_masked(node: OnNode) -> None:
    look = "wc -c < /proc/keys; for file in /proc/sys/kernel/sysrq /sys/kernel/mm/ksm/run; do"
    look += " (echo 1 > $file) 2>/dev/null || echo refused; done"

    async def body(runtime: NodeRuntime) -> list[str]:
        sandbox = await runtime.run_sandbox(HOST)
        return await output(runtime, sandbox.id, script(look))

    assert node.run(body) == ["0", "refused", "refused"]


def test_a_container_is_in_the_cgroup_that_the_kubelet_names_and_sees_itself_as_the_root(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[str, str, list[str]]:
        config = pod("cgroup", host_network=True)
        sandbox = await runtime.run_sandbox(config)
        name = await start(runtime, sandbox.id, container("sleep", "100"))
        pid = (
            Path("/sys/fs/cgroup", config.cgroup_parent, f"cri-containerd-{name}.scope") / "cgroup.procs"
        ).read_text()
        inside = await runtime.exec_sync(name, ["cat", "/proc/self/cgroup"], 5)
        return Path(f"/proc/{int(pid)}/comm").read_text(), inside.output.decode(), list(os.listdir("/sys/fs/cgroup"))

    command, inside, top = node.run(body)
    assert command == "sleep\n" and "0::/\n" in inside and "kubepods.slice" in top


def test_resources_without_a_controller_do_not_keep_a_container_from_running(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> int:
        sandbox = await runtime.run_sandbox(HOST)
        resources = Resources(cpu_shares=512, cpu_quota=50_000, memory_limit=1 << 26, oom_score_adj=-997)
        name = await start(runtime, sandbox.id, script("exit 0", resources=resources))
        return (await ended(runtime, name)).exit_code

    assert node.run(body) == 0


def test_what_cannot_start_is_said_and_is_an_ended_container(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[str, str, int, str]:
        sandbox = await runtime.run_sandbox(HOST)
        name = await runtime.create_container(sandbox.id, container("no-such-program"))
        with pytest.raises(RuntimeFault) as caught:
            await runtime.start_container(name)
        found = await status(runtime, name)
        return caught.value.reason, str(caught.value), found.exit_code, found.reason

    reason, message, code, ended_by = node.run(body)
    assert reason == "RunContainerError" and "executable file `no-such-program` not found in $PATH" in message
    assert (code, ended_by) == (128, "StartError")


def test_a_container_has_the_usual_devices_and_only_a_privileged_one_has_others(node: OnNode) -> None:
    # A device that its cgroup refuses cannot be opened, even by a root who may make its node: EPERM.
    text = """mknod /tmp/full c 1 7; mknod /tmp/kmsg c 1 11; mknod /tmp/other b 1 7
    for path in /dev/null /dev/zero /dev/tty /dev/ptmx /tmp/full /tmp/kmsg /tmp/other
    do (: < $path) 2>&1 | grep -q "not permitted" && echo $path; done; :"""

    async def body(runtime: NodeRuntime) -> list[list[str]]:
        sandbox = await runtime.run_sandbox(HOST)
        securities = Security(), Security(privileged=True)
        return [await output(runtime, sandbox.id, script(text, security=security)) for security in securities]

    assert node.run(body) == [["/tmp/kmsg", "/tmp/other"], []]


def test_an_unknown_image_runs_with_a_command_and_is_an_err_image_pull_without(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[str, str, list[str]]:
        sandbox = await runtime.run_sandbox(HOST)
        with pytest.raises(RuntimeFault) as caught:
            await runtime.create_container(sandbox.id, container(image="example.org/team/app:1.0"))
        ran = await output(runtime, sandbox.id, container("echo", "ran", image="example.org/team/app:1.0"))
        return caught.value.reason, str(caught.value), ran

    reason, message, ran = node.run(body)
    assert reason == "ErrImagePull" and "example.org/team/app:1.0" in message and ran == ["ran"]


def test_the_products_images_have_the_product_and_its_python(node: OnNode) -> None:
    import_it = "import undermesh.controlplane, msgspec, grpc, sys; print(sys.prefix != '')"

    async def body(runtime: NodeRuntime) -> list[list[str]]:
        sandbox = await runtime.run_sandbox(HOST)
        env = (("PYTHONPATH", "/opt/undermesh/python:/opt/undermesh/site-packages"),)
        image = "registry.example/undermesh/controlplane:dev"
        python = await output(runtime, sandbox.id, container("python3", "-c", import_it, image=image, env=env))
        user = await output(runtime, sandbox.id, script("id -u", image=image))
        files = await output(runtime, sandbox.id, script("ls /opt/undermesh/bin", image="undermesh/agent:dev"))
        return [python, user, files]

    python, user, files = node.run(body)
    assert python == ["True"] and user == ["65532"]
    assert {"ztunnel", "undermesh-cni", "undermesh-agent"} <= set(files)


def test_a_mount_made_below_a_host_to_container_mount_appears_and_a_private_one_does_not(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[bytes, bytes]:
        Path("/run/shared").mkdir()
        sandbox = await runtime.run_sandbox(HOST)
        names = [
            await start(
                runtime,
                sandbox.id,
                container("sleep", "100", mounts=(Mount("/run/shared", "/mnt/x", propagation=propagation),)),
            )
            for propagation in ("HostToContainer", "None")
        ]
        process = await asyncio.create_subprocess_shell(
            "mkdir /run/shared/below && mount -n -t tmpfs none /run/shared/below && touch /run/shared/below/file"
        )
        assert await process.wait() == 0
        results = [(await runtime.exec_sync(name, ["ls", "/mnt/x/below"], 5)).output for name in names]
        await (await asyncio.create_subprocess_exec("umount", "/run/shared/below")).wait()
        return results[0], results[1]

    assert node.run(body) == (b"file\n", b"")


def test_a_mount_made_in_a_bidirectional_mount_appears_on_the_node(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> bool:
        Path("/run/both").mkdir()
        sandbox = await runtime.run_sandbox(HOST)
        mount = Mount("/run/both", "/mnt/x", propagation="Bidirectional")
        config = script(
            "mkdir /mnt/x/made && mount -t tmpfs none /mnt/x/made && touch /mnt/x/made/file",
            mounts=(mount,),
            security=Security(privileged=True),
        )
        assert await output(runtime, sandbox.id, config) == []
        seen = Path("/run/both/made/file").exists()
        await (await asyncio.create_subprocess_exec("umount", "/run/both/made")).wait()
        return seen

    assert node.run(body)


def test_a_running_container_is_not_removed(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[str, ContainerState]:
        sandbox = await runtime.run_sandbox(HOST)
        name = await start(runtime, sandbox.id, container("sleep", "100"))
        with pytest.raises(RuntimeFault) as caught:
            await runtime.remove_container(name)
        return caught.value.reason, (await status(runtime, name)).state

    assert node.run(body) == ("ContainerRunning", ContainerState.RUNNING)
