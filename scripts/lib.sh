# SPDX-License-Identifier: GPL-2.0
# Sourced by every script here: where things are, progress, failure, and how to enter the build root.
# shellcheck shell=bash

set -euo pipefail

# The checkout that these scripts belong to.
RVISOR_SRC=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# Everything slow to make lives here, outside the checkout.
RVISOR_CACHE=${RVISOR_CACHE:-${HOME:-/root}/.cache/rvisor}
# What is made from this checkout: cheap to make again, removed by "make clean".
RVISOR_BUILD=$RVISOR_SRC/build

say() { printf '%s\n' "$*" >&2; }

die() {
	printf 'rvisor: %s\n' "$*" >&2
	exit 1
}

# seconds_text SECONDS: "7 s" or "2 min 5 s".
seconds_text() {
	if [ "$1" -ge 60 ]; then
		printf '%d min %d s' $(($1 / 60)) $(($1 % 60))
	else
		printf '%d s' "$1"
	fi
}

# step LOG TEXT COMMAND...: runs COMMAND with its output in the file LOG. Says TEXT at the start and
# the time taken at the end; on failure shows the end of LOG and fails.
step() {
	local log=$1 text=$2 start=$SECONDS status=0 pid
	shift 2
	mkdir -p "$(dirname "$log")"
	if [ -t 2 ]; then
		# `wait` must not kill the script under `set -e` before the failure is shown.
		("$@") >"$log" 2>&1 </dev/null &
		pid=$!
		while kill -0 "$pid" 2>/dev/null; do
			printf '\r%s ... %s ' "$text" "$(seconds_text $((SECONDS - start)))" >&2
			sleep 1
		done
		wait "$pid" || status=$?
		printf '\r\033[K' >&2
	else
		printf '%s ...\n' "$text" >&2
		("$@") >"$log" 2>&1 </dev/null || status=$?
	fi
	if [ "$status" -ne 0 ]; then
		say "$text: failed after $(seconds_text $((SECONDS - start))). The end of $log:"
		tail -n 30 "$log" | sed 's/^/    /' >&2
		die "$text failed (status $status)"
	fi
	printf '%s: %s\n' "$text" "$(seconds_text $((SECONDS - start)))" >&2
}

# key_of: a short key of what stands on standard input.
key_of() { sha256sum | cut -c1-16; }

# need_space DIRECTORY GIB: fails where the file system of DIRECTORY has less room than that.
need_space() {
	local have
	have=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }')
	[ "$have" -ge "$2" ] ||
		die "$1 has $have GiB of free space and $2 GiB are needed; free some or set RVISOR_CACHE to a folder with more"
}

need_root() {
	[ "$(id -u)" -eq 0 ] ||
		die "this needs root (it makes a Debian root with debootstrap and enters it with chroot): run it with sudo"
}

# with_lock NAME COMMAND...: one process at a time for each NAME in the cache.
with_lock() {
	local name=$1 fd
	shift
	mkdir -p "$RVISOR_CACHE"
	exec {fd}>"$RVISOR_CACHE/$name.lock"
	flock "$fd"
	"$@"
	exec {fd}>&-
}

# The path of the build root; it is keyed by the script and the package list that made it.
build_root_path() {
	printf '%s/root-%s\n' "$RVISOR_CACHE" \
		"$(cat "$RVISOR_SRC/scripts/build-root" "$RVISOR_SRC/scripts/packages" | key_of)"
}

# in_root COMMAND...: runs COMMAND in the build root, in this folder, with the checkout and the cache
# at the same paths as outside. The mounts end with the command.
in_root() { (exec_in_root "$@"); }

# exec_in_root COMMAND...: the same, but this shell becomes COMMAND: its process id is then COMMAND's.
exec_in_root() {
	exec unshare --mount --propagation private -- \
		bash "$RVISOR_SRC/scripts/enter-root" "$(build_root_path)" "$RVISOR_SRC" "$RVISOR_CACHE" "$PWD" "$@"
}
