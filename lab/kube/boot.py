"""The first process of a node: it turns its new namespaces into a node, says so, and holds them open.

Nothing it does is seen on the machine: mounts are private from the start, and shared only among the node's own.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from undermesh.lab.kube.layout import ClusterLayout, NodeLayout

READY = "booted"
OVERLAYS = ("etc", "opt", "var")
HIDDEN = (
    "etc/cni",
    "etc/undermesh",
    "opt/cni",
    "opt/undermesh",
    "var/lib/cni",
    "var/lib/kubelet",
    "var/lib/undermesh",
    "var/log/containers",
    "var/log/pods",
)
"""Directories of a node that begin empty, whatever the machine has there."""

# "step" goes into the message if the next command fails. The shell is in the node's cgroup, which is the root of
# its cgroup namespace, and moves out: a cgroup with processes of its own can give no controllers to others.
# A mount below /run may vanish by itself: when another lab deletes a netns and its file, the kernel unmounts it in
# every mount namespace.
_SCRIPT = """\
set -eu
step=''
trap 'test -z "$step" || echo "failed: $step" >&2' EXIT
step='mount private'; mount -n --make-rprivate /
step='cgroup2'; umount -n --recursive /sys
mount -n -t sysfs sysfs /sys
mount -n -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /sys/fs/cgroup/init.scope /sys/fs/cgroup/system.slice/kubelet.service
echo $$ > /sys/fs/cgroup/init.scope/cgroup.procs
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
  echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || :
done
step='bpf file system'; mount -n -t bpf bpf /sys/fs/bpf
for name in etc opt var; do
  step="overlay file system at /$name"
  mount -n -t overlay "$name" -o "lowerdir=/$name,upperdir=$DISK/$name/upper,workdir=$DISK/$name/work" "/$name"
done
step='tmpfs at /run'; mount -n -t tmpfs staging /mnt
mkdir /mnt/run
mount -n -t tmpfs -o mode=755 tmpfs /mnt/run
mkdir -p "/mnt$CLUSTER" /mnt/run/lock /mnt/run/netns
mount -n --bind "$CLUSTER" "/mnt$CLUSTER"
for target in $(awk '$2 ~ "^/run(/|$)" { print $2 }' /proc/mounts | sort -r); do
  umount -n --lazy "$target" 2>/dev/null || ! mountpoint -q "$target" || umount -n --lazy "$target"
done
mount -n --move /mnt/run /run
umount -n /mnt
step='boot id'; mount -n --bind "$BOOT_ID" /proc/sys/kernel/random/boot_id
step='host name'; echo "$NAME" > /proc/sys/kernel/hostname
step='mount shared'; mount -n --make-rshared /
step=''
echo booted
exec sleep infinity >/dev/null 2>&1
"""


def command(cluster: ClusterLayout, node: NodeLayout, netns: Path) -> list[str]:
    """The command line of the first process; it stays one process, in the node's cgroup from the start.

    It prints READY on stdout when the node is one; until then it says on stderr what failed.
    """
    variables = {
        "NAME": node.name,
        "CLUSTER": str(cluster.directory),
        "DISK": str(node.disk),
        "BOOT_ID": str(node.directory / "boot_id"),
    }
    settings = "".join(f"{key}={shlex.quote(value)}; " for key, value in variables.items())
    unshared = ["unshare", "--mount", "--uts", "--cgroup", "--propagation", "private"]
    enter = 'echo 0 > "$1/cgroup.procs" && shift && exec "$@"'
    inner = [*unshared, "sh", "-c", settings + _SCRIPT]
    return ["sh", "-c", enter, "sh", str(node.cgroup), "nsenter", f"--net={netns}", "--", *inner]
