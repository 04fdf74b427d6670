#!/usr/bin/env bash
# Runs the kernel-facing tests on Debian's own kernel, in qemu without KVM.
#
#   tools/test_kernel.sh [PYTEST ARGS]       default: -m root and those of tests/bpf, tests/capture that exist
#   tools/test_kernel.sh --run COMMAND ...   any other command, as root in the same guest
#
# The guest sees this machine's root file system read-only (9p) below an overlay in memory, so it runs the
# same checkout with the same build/venv and changes nothing here. It has no network. qemu runs as the caller;
# sudo is used for missing Debian packages only. The exit status is the command's own.
#
#   KERNEL_PACKAGE  Debian package of the kernel     (linux-image-amd64: the newest that apt offers)
#   KERNEL_DEB      a .deb at hand instead of it
#   TIME_LIMIT      seconds until the guest is stopped, status 124   (7200)
#   MEMORY, CPUS    of the guest                     (2G, those of this machine up to 4)
#   V=1             shows the kernel's messages
set -euo pipefail

KERNEL_PACKAGE=${KERNEL_PACKAGE:-linux-image-amd64}
KERNEL_DEB=${KERNEL_DEB:-}
TIME_LIMIT=${TIME_LIMIT:-7200}
MEMORY=${MEMORY:-2G}
CPUS=${CPUS:-$(n=$(nproc); echo $((n < 4 ? n : 4)))}

here=$(cd "$(dirname "$0")" && pwd -P)
top=${here%/tools}
cache=$top/build/kernel
export PATH=$PATH:/usr/sbin:/sbin

say() { printf 'test-kernel: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"; return; fi
	command -v sudo >/dev/null || die "needs root once, and there is no sudo: run as root: $*"
	sudo "$@"
}

install_tools() { # what only this target needs
	local need missing=()
	for need in qemu-system-x86_64:qemu-system-x86 cpio:cpio busybox:busybox-static dpkg-deb:dpkg; do
		command -v "${need%%:*}" >/dev/null || missing+=("${need#*:}")
	done
	# A busybox that is linked dynamically cannot run in the initramfs.
	if command -v busybox >/dev/null && ldd "$(command -v busybox)" >/dev/null 2>&1; then missing+=(busybox-static); fi
	[ ${#missing[@]} -gt 0 ] || return 0
	say "installing: ${missing[*]}"
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "${missing[@]}" >/dev/null ||
		die "could not install ${missing[*]}: see apt-get's message above"
}

kernel_package() { # the versioned package behind a metapackage, empty if apt knows none
	local target
	target=$(apt-cache depends "$KERNEL_PACKAGE" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' | head -n 1)
	if [ -z "$target" ] && apt-cache show "$KERNEL_PACKAGE" >/dev/null 2>&1; then target=$KERNEL_PACKAGE; fi
	printf '%s' "$target"
}

fetch_deb() { # into $cache/deb; prints its path
	local package=$1 dir=$cache/deb
	rm -rf "$dir" && mkdir -p "$dir"
	# apt drops root for the download and warns where its own user may not write.
	(cd "$dir" && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2) || return 1
	ls "$dir"/*.deb
}

unpack() { # the kernel and the modules that containers' networks can need, of a 400 MB package
	local deb=$1 dir=$2 version
	rm -rf "$dir" && mkdir -p "$dir"
	dpkg-deb --fsys-tarfile "$deb" | tar -C "$dir" -x --wildcards --no-wildcards-match-slash \
		'./boot/vmlinuz-*' './lib/modules/*/modules.*' './lib/modules/*/kernel/'{arch,crypto,fs,lib,net} \
		'./lib/modules/*/kernel/drivers/virtio' './lib/modules/*/kernel/drivers/net/'{'*.ko',wireguard,ipvlan} ||
		die "$deb does not hold a kernel as Debian packages it"
	version=$(basename "$dir"/lib/modules/*)
	busybox depmod -b "$dir" "$version"
	touch "$dir/.done"
}

prepare_kernel() { # sets $kernel, the unpacked package
	local package deb=
	if [ -n "$KERNEL_DEB" ]; then
		[ -r "$KERNEL_DEB" ] || die "KERNEL_DEB: cannot read $KERNEL_DEB"
		package=$(basename "$KERNEL_DEB" .deb) deb=$KERNEL_DEB
	else
		package=$(kernel_package)
		if [ -z "$package" ]; then
			as_root apt-get -qq update
			package=$(kernel_package)
		fi
		[ -n "$package" ] || die "apt offers no $KERNEL_PACKAGE here (Ubuntu has none): fetch Debian's package and set KERNEL_DEB=FILE"
		package=${package}_$(apt-cache show --no-all-versions "$package" | sed -n 's/^Version: //p')
	fi
	kernel=$cache/$package
	[ -e "$kernel/.done" ] && return
	if [ -z "$deb" ]; then
		say "fetching $package"
		deb=$(fetch_deb "${package%%_*}") || {
			as_root apt-get -qq update
			deb=$(fetch_deb "${package%%_*}") || die "could not download $package: is the package mirror reachable?"
		}
	fi
	unpack "$deb" "$kernel"
	rm -rf "$cache/deb"
}

module_files() { # NAME...: with what they depend on, first things first, relative to the modules' directory
	local name line
	for name; do
		line=$(grep "/$name\.ko:" "$modules/modules.dep") || continue # built in, or not in this kernel
		printf '%s\n' ${line#*:} | tac
		printf '%s\n' "${line%%:*}"
	done | awk 'NF && !seen[$0]++'
}

make_initramfs() { # busybox, the modules that reach the root file system, init, and what to run
	local root=$work/root file
	mkdir -p "$root"/{bin,modules,proc,sys,dev,host,memory,new}
	cp "$(command -v busybox)" "$root/bin/busybox"
	cp "$here/test_kernel/init" "$root/init"
	printf '%s' "$here/test_kernel/guest.sh" > "$root/guest"
	while read -r file; do
		cp "$modules/$file" "$root/modules/"
		basename "$file"
	done < <(module_files virtio_pci 9pnet_virtio 9p overlay) > "$root/modules/order"
	{
		printf 'TOP=%q\n' "$top"
		printf 'MODULES=%q\n' "$kernel/lib/modules"
		printf 'export COLUMNS=%q %s\n' "${COLUMNS:-120}" "$([ -t 1 ] || echo NO_COLOR=1)"
		printf 'COMMAND=('
		printf '%q ' "$@"
		printf ')\n'
	} > "$root/command"
	(cd "$root" && find . | cpio --quiet -o -H newc) > "$work/initramfs"
}

boot() {
	local status=0 messages=quiet
	[ -z "${V:-}" ] || messages="ignore_loglevel"
	timeout --foreground --kill-after=5 "$TIME_LIMIT" qemu-system-x86_64 \
		-machine q35 -accel tcg,thread=multi -cpu max,la57=off -smp "$CPUS" -m "$MEMORY" \
		-nodefaults -no-user-config -no-reboot -display none -serial stdio -nic none \
		-kernel "$kernel"/boot/vmlinuz-* -initrd "$work/initramfs" \
		-append "console=ttyS0 $messages panic=-1 tsc=reliable clocksource=tsc no_timer_check nowatchdog mitigations=off nokaslr random.trust_cpu=on" \
		-fsdev "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap" \
		-device virtio-9p-pci,fsdev=host,mount_tag=host \
		-device isa-debug-exit,iobase=0xf4,iosize=0x04 </dev/null || status=$?
	case $status in
	124 | 137) say "stopped after $TIME_LIMIT s: set TIME_LIMIT for more"; return 124 ;;
	0) say "the guest ended without a result: its kernel crashed, or init failed; V=1 shows its messages"; return 2 ;;
	esac
	# isa-debug-exit turns a status n into 2n+1; an even one is qemu's or the shell's own.
	if ((status % 2 == 0)); then say "qemu ended with status $status"; return 2; fi
	return $((status / 2))
}

main() {
	[ "$(uname -m)" = x86_64 ] || die "needs an x86-64 machine, this is $(uname -m)"
	[ "$(id -u)" != 0 ] || umask 022
	local args
	if [ "${1:-}" = --run ]; then
		shift
		[ $# -gt 0 ] || die "--run needs a command"
		args=("$@")
	else
		[ -x "$top/build/venv/bin/python" ] || die "there is no build/venv: run \`make build\` first"
		if [ $# -eq 0 ]; then
			set -- -m root
			local dir
			for dir in tests/bpf tests/capture; do [ ! -d "$top/$dir" ] || set -- "$@" "$dir"; done
			[ $# -gt 2 ] || die "neither tests/bpf nor tests/capture is here"
		fi
		# An emulated CPU is many times slower than the time limits of the tests expect.
		args=("$top/build/venv/bin/python" -m pytest -o cache_dir=/tmp/pytest-cache --timeout 900 "$@")
	fi
	install_tools
	mkdir -p "$cache"
	prepare_kernel
	modules=$(echo "$kernel"/lib/modules/*)
	work=$(mktemp -d "$cache/run.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	make_initramfs "${args[@]}"
	say "booting ${modules##*/} with $CPUS emulated CPUs"
	boot
}

main "$@"
