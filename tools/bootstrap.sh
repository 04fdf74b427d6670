#!/usr/bin/env bash
# Installs what building and testing need and this machine lacks: Debian packages, and a Rust toolchain
# if there is none or it is too old. Run as the user who builds; sudo is used for packages only.
set -euo pipefail

say() { printf 'bootstrap: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

[ "$(uname -s)" = Linux ] || die "undermesh needs Linux, this is $(uname -s)"
command -v apt-get >/dev/null || die "needs Debian 12 or Ubuntu 24.04: apt-get is not here. Elsewhere install the packages that this script lists by hand"

as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"; return; fi
	command -v sudo >/dev/null || die "packages are missing and there is no sudo: run once as root: apt-get install $*"
	sudo "$@"
}

# command or file that shows it is there -> package
needs=(
	clang:clang llvm-strip:llvm clang-format:clang-format protoc:protobuf-compiler bpftool:bpftool
	/usr/include/bpf/bpf_helpers.h:libbpf-dev cc:build-essential cmake:cmake git:git ip:iproute2 nsenter:util-linux nft:nftables
	tcpdump:tcpdump runc:runc crun:crun cpio:cpio busybox:busybox-static setcap:libcap2-bin sysctl:procps
)
export PATH="$HOME/.cargo/bin:/usr/sbin:/sbin:$PATH"
missing=()
for need in "${needs[@]}"; do
	have=${need%%:*} package=${need#*:}
	if [ "$have" = bpftool ] && grep -qi ubuntu /etc/os-release; then package=linux-tools-generic; fi
	case $have in
	/*) [ -e "$have" ] || missing+=("$package") ;;
	*) command -v "$have" >/dev/null || missing+=("$package") ;;
	esac
done
"$(dirname "$0")/find_python.sh" >/dev/null 2>&1 || missing+=(python3 python3-venv)

# The oldest Rust that the pinned crates accept; Cargo.toml says the same.
rust_min=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")
rust_ok() { # rustc cargo
	command -v "$1" >/dev/null && command -v "$2" >/dev/null || return 1
	local version
	version=$("$1" --version 2>/dev/null | awk '{print $2}') && [ -n "$version" ] || return 1
	[ "$(printf '%s\n%s\n' "$rust_min" "$version" | sort -V | head -n 1)" = "$rust_min" ]
}
rust_missing=
rust_ok rustc cargo || rust_missing=1

if [ ${#missing[@]} -gt 0 ] || [ -n "$rust_missing" ]; then
	say "refreshing the package lists"
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update || die "apt-get update failed: check /etc/apt/sources.list"
fi
if [ ${#missing[@]} -gt 0 ]; then
	say "installing: ${missing[*]}"
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "${missing[@]}" >/dev/null ||
		die "could not install ${missing[*]}: see apt-get's message above"
fi
if [ -n "$rust_missing" ]; then
	# Debian 12 keeps a current toolchain as rustc-web; Ubuntu has versioned packages and rustup.
	package=
	if apt-cache show rustc-web >/dev/null 2>&1; then
		package="rustc-web cargo-web"
	else
		for version in $(apt-cache search --names-only '^rustc-1\.[0-9]+$' | sed -E 's/^rustc-([0-9.]+) .*/\1/' | sort -rV); do
			if [ "$(printf '%s\n%s\n' "$rust_min" "$version" | sort -V | head -n 1)" = "$rust_min" ]; then
				package="rustc-$version cargo-$version"
				break
			fi
		done
	fi
	if [ -n "$package" ]; then
		say "installing a Rust toolchain: $package"
		# shellcheck disable=SC2086
		as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends $package >/dev/null ||
			die "could not install $package: see apt-get's message above"
		suffix=${package%% *} suffix=${suffix#rustc}
		if ! rust_ok rustc cargo; then
			mkdir -p "$HOME/.cargo/bin"
			for tool in rustc cargo; do
				if [ -x "/usr/bin/$tool$suffix" ]; then ln -sf "/usr/bin/$tool$suffix" "$HOME/.cargo/bin/$tool"; fi
			done
		fi
	elif apt-cache show rustup >/dev/null 2>&1; then
		say "installing a Rust toolchain by rustup"
		as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install rustup >/dev/null
		rustup default stable
	fi
	hash -r
	rust_ok rustc cargo || die "needs Rust $rust_min or newer: install it (https://rustup.rs) and run again"
fi
say "ready"
