#!/bin/bash
# PID 1 of the guest after init: mounts what a node has, runs the command of /run/test-kernel/command, and
# hands its exit status to qemu. Run by tools/test_kernel.sh only.
set -u
mine=/run/test-kernel
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8

finish() { # STATUS: qemu exits with 2 * STATUS + 1
	sync
	printf "\\x$(printf %02x $(($1 > 127 ? 1 : $1)))" | dd of=/dev/port bs=1 seek=$((0xf4)) conv=notrunc status=none
	echo "test-kernel guest: qemu did not take the exit status"
	$mine/busybox poweroff -f
}

stty -opost </dev/console 2>/dev/null
# shellcheck source=/dev/null
. $mine/command
mkdir -p /dev/pts /dev/shm /run/lock
mount -t devpts devpts /dev/pts && mount -t tmpfs shm /dev/shm && mount -t cgroup2 cgroup /sys/fs/cgroup &&
	mount -t bpf bpf /sys/fs/bpf && mount -t debugfs debug /sys/kernel/debug && mount -t tracefs trace /sys/kernel/tracing ||
	finish 2

# The kernel asks for modules by this program.
mkdir -p /lib/modules && mount --bind "$MODULES" /lib/modules || finish 2
ln -s busybox $mine/modprobe
echo $mine/modprobe >/proc/sys/kernel/modprobe
ip link set lo up
hostname test-kernel 2>/dev/null

export PYTHONPATH="$TOP/build/py" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
cd "$TOP" || finish 2
"${COMMAND[@]}" </dev/null
finish $?
