"""Network sysctls where /proc/sys is read-only, as in every container."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from capture.topology import Netns

from undermesh.agent import netns, sysctls


@pytest.fixture
def other() -> Iterator[Netns]:
    made = Netns()
    yield made
    made.close()


@pytest.mark.root
def test_values_are_those_of_the_thread_s_namespace(other: Netns) -> None:
    here = sysctls.read("ipv4/ip_local_port_range")
    netns.run_in(other.fd, lambda: sysctls.write("ipv4/ip_local_port_range", "20000 20100"))
    assert other.sysctl("ipv4/ip_local_port_range").split() == ["20000", "20100"]
    assert netns.run_in(other.fd, lambda: sysctls.read("ipv4/ip_local_port_range")) == "20000\t20100"
    assert sysctls.read("ipv4/ip_local_port_range") == here


@pytest.mark.root
def test_what_the_kernel_has_not_is_none() -> None:
    assert sysctls.read("ipv4/nonsense") is None
    with pytest.raises(FileNotFoundError):
        sysctls.write("ipv4/nonsense", "1")


WRITE = """
from undermesh.agent import sysctls
try:
    open("/proc/sys/net/ipv4/tcp_fwmark_accept", "w")
except OSError as e:
    print(e.strerror)
sysctls.write("ipv4/tcp_fwmark_accept", "1")
print(sysctls.read("ipv4/tcp_fwmark_accept"), repr(sysctls.writable()))
"""


@pytest.mark.root
def test_a_read_only_proc_sys_is_no_obstacle(other: Netns) -> None:
    mounts = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys"
    inside = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", sys.executable, "-c", WRITE]
    done = subprocess.run(["nsenter", f"--net={other.path}", *inside], capture_output=True, text=True, timeout=20)
    assert done.stdout.splitlines() == ["Read-only file system", "1 ''"], done.stderr
    assert other.sysctl("ipv4/tcp_fwmark_accept") == "1"


@pytest.mark.root
def test_without_the_right_to_mount_the_reason_says_what_is_missing() -> None:
    code = "from undermesh.agent import sysctls; print(sysctls.writable())"
    powerless = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c", code]
    done = subprocess.run(powerless, capture_output=True, text=True, timeout=20)
    assert "no procfs can be mounted (Operation not permitted): the agent needs CAP_SYS_ADMIN" in done.stdout, (
        done.stderr
    )
