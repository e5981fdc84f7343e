# SPDX-License-Identifier: GPL-2.0
# Sourced by every script here: where things are, progress, failure, and how to enter the build root.
# shellcheck shell=bash

set -euo pipefail

# The checkout that these scripts belong to.
RVISOR_SRC=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# Everything slow to make lives here, outside the checkout.
RVISOR_CACHE=${RVISOR_CACHE:-${HOME:-/root}/.cache/rvisor}
# What is made from this checkout: cheap to make again, removed by "make clean".
# shellcheck disable=SC2034 # used by those who source this
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

# ticker PATIENCE TEXT: says TEXT once PATIENCE seconds are over; on a terminal, keeps the time beside it until it is
# killed or the script has ended. Writes an empty line to its output when it can be killed.
ticker() {
	local since=$SECONDS never
	# Nothing comes from there: to wait for that leaves no sleep behind, which would hold the script's output open.
	exec {never}<> <(:)
	echo
	exec >/dev/null
	while ! read -r -t "$([ -t 2 ] && echo 1 || echo "$1")" -u "$never" && kill -0 $$ 2>/dev/null; do
		if [ ! -t 2 ]; then
			printf '%s ...\n' "$2" >&2
			return
		fi
		[ $((SECONDS - since)) -lt "$1" ] || printf '\r%s ... %s ' "$2" "$(seconds_text $((SECONDS - since)))" >&2
	done
}

# start_progress TEXT PATIENCE: a line of progress once PATIENCE seconds are over. end_progress ends it.
start_progress() {
	local ready
	progress_text=$1 progress_patience=$2 progress_since=$SECONDS progress=''
	if [ "$2" -eq 0 ] && [ ! -t 2 ]; then
		printf '%s ...\n' "$1" >&2
		return
	fi
	# A new process has this shell's traps for a moment: killed then, it would run them, "rm -rf" of a half-made root
	# among them. "trap -p" does not help here: in a subshell it shows the outer shell's.
	exec {ready}< <(ticker "$2" "$1" </dev/null)
	progress=$!
	read -r -u "$ready" || true
	exec {ready}<&-
}

# end_progress STATUS: says the time taken, where it went well and was worth a line.
end_progress() {
	progress_taken=$((SECONDS - progress_since))
	if [ -n "$progress" ]; then
		kill "$progress" 2>/dev/null || true
		wait "$progress" 2>/dev/null || true
		[ ! -t 2 ] || printf '\r\033[K' >&2
	fi
	[ "$1" -ne 0 ] || [ "$progress_taken" -lt "$progress_patience" ] ||
		printf '%s: %s\n' "$progress_text" "$(seconds_text "$progress_taken")" >&2
}

# step LOG TEXT COMMAND...: runs COMMAND with its output in the file LOG. Says TEXT at the start and
# the time taken at the end; on failure says why, with the end of LOG where the network is not the reason.
# quiet_step: the same, but what is over within about two seconds says nothing.
step() { run_step 0 "$@"; }
quiet_step() { run_step 2 "$@"; }

run_step() {
	local patience=$1 log=$2 text=$3 status=0
	shift 3
	mkdir -p "$(dirname "$log")"
	start_progress "$text" "$patience"
	# The command stays in the foreground, where Ctrl-C reaches it.
	# A subshell of its own with errexit: `||` would switch errexit off in a function called here.
	set +e
	(set -e; "$@") >"$log" 2>&1 </dev/null
	status=$?
	set -e
	end_progress "$status"
	[ "$status" -eq 0 ] || step_failed "$log" "$text" "$status" "$progress_taken"
}

# What apt, debootstrap and cargo say where there is no network.
NO_NETWORK='Temporary failure (in name )?resol|Could not resolve|Could not connect|Network is unreachable|Failed getting release file|No route to host|failed to download|spurious network error|Unable to connect|Unable to fetch some archives'

# step_failed LOG TEXT STATUS SECONDS
step_failed() {
	if grep -Eqs "$NO_NETWORK" "$1"; then
		die "$2 failed: a server cannot be reached; it needs the network (http_proxy is honoured; details in $1)"
	fi
	say "$2: failed after $(seconds_text "$4"). The end of $1:"
	tail -n 30 "$1" | sed 's/^/    /' >&2
	die "$2 failed (status $3)"
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

# The path of the build root, keyed by the package list. The number is the recipe's in scripts/build-root:
# a change there that must reach existing roots counts it up.
build_root_path() {
	printf '%s/root-%s\n' "$RVISOR_CACHE" "$({ printf 'recipe 1\n'; grep -v '^#' "$RVISOR_SRC/scripts/packages"; } | key_of)"
}

# Where the build root has the tool's Rust: Debian's newest, beside the one that kernel and module are built with. Its
# name has the version that the tool wants at least, so that a later want makes it anew.
TOOL_RUST=/opt/rust-web-$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$RVISOR_SRC/userspace-tool/Cargo.toml")

# Prints which of testhost's kernels "make HOST=..." means; it comes here as RVISOR_HOST.
kernel_of_host() {
	case ${RVISOR_HOST:-} in
	'') echo small ;;
	debian) echo stock ;;
	checked) echo checked ;;
	*) die "HOST is $RVISOR_HOST; it can be debian, for Debian's stock kernel, or checked, for one that checks itself" ;;
	esac
}

# cargo_in_root NAME COMMAND...: cargo in the build root, for the crate in this folder, with a target folder of that
# name. Each checkout has its own: cargo tells a crate's copies in two checkouts apart by nothing but the files' times.
cargo_in_root() {
	local name=$1 rust=()
	shift
	[ "$PWD" != "$RVISOR_SRC/userspace-tool" ] ||
		rust=(PATH="$TOOL_RUST/usr/bin:/usr/bin:/bin" LD_LIBRARY_PATH="$TOOL_RUST/usr/lib/x86_64-linux-gnu")
	in_root env ${rust[@]+"${rust[@]}"} CARGO_TARGET_DIR="$RVISOR_BUILD/target/$name" cargo "$@"
}

# in_root COMMAND...: runs COMMAND in the build root, in this folder, with the checkout and the cache
# at the same paths as outside. The mounts end with the command.
in_root() { (exec_in_root "$@"); }

# in_root_of ROOT COMMAND...: the same in another root, in its "/".
in_root_of() {
	local root=$1
	shift
	unshare --mount --propagation private -- \
		bash "$RVISOR_SRC/scripts/enter-root" "$root" "$RVISOR_SRC" "$RVISOR_CACHE" / "$@"
}

# exec_in_root COMMAND...: as in_root, but this shell becomes COMMAND: its process id is then COMMAND's.
exec_in_root() {
	exec unshare --mount --propagation private -- \
		bash "$RVISOR_SRC/scripts/enter-root" "$(build_root_path)" "$RVISOR_SRC" "$RVISOR_CACHE" "$PWD" "$@"
}
