# SPDX-License-Identifier: GPL-2.0
# scripts/testhost tells a host that failed from one that did well: the script's own status, a warning, a bug, a lock
# report, a panic, a hang, an end before the script's. In QEMU's emulation, which boots fastest.
# Run on this machine, as root: sh tests/host/testhost.sh
# shellcheck shell=sh disable=SC2317 # the functions are called by name

here=$(cd "$(dirname "$0")" && pwd -P)
. "$here/../lib/ktap.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export RVISOR_TESTHOST=qemu-tcg

# host_gives STATUS TEXT SCRIPT [OPTIONS...]: the host runs SCRIPT, the status is STATUS, and TEXT comes out.
host_gives() {
	wanted=$1 text=$2
	printf '%s\n' "$3" >"$work/script"
	shift 3
	"$here/../../scripts/testhost" --quiet --script "$work/script" "$@" >"$work/out" 2>&1 </dev/null
	status=$?
	check "status $status, not $wanted: $(tail -n 3 "$work/out" | tr '\n' ' ')" test $status -eq "$wanted" || return
	check "no \"$text\" in: $(tail -n 3 "$work/out" | tr '\n' ' ')" grep -qF "$text" "$work/out"
}

test_status_and_output_of_the_script() { host_gives 7 "seen-42" 'echo seen-$((6*7)); exit 7'; }
test_success() { host_gives 0 "well" 'echo well'; }
test_warning() { host_gives 125 "kernel complained" 'echo "<4>WARNING: CPU: 0 PID: 1 at somewhere" >/dev/kmsg'; }
test_bug() { host_gives 125 "kernel complained" 'echo "<3>BUG: sleeping function called from here" >/dev/kmsg'; }
test_lock_report() { host_gives 125 "kernel complained" 'echo "<4>INFO: possible recursive locking" >/dev/kmsg'; }
test_panic() { host_gives 125 "Kernel panic" 'echo c >/proc/sysrq-trigger; sleep 100'; }
test_hang() { host_gives 124 "killed after 15 s" 'sleep 1000' --time 15; }
test_end_before_the_scripts() { host_gives 125 "ended before the script did" 'poweroff -f; sleep 100'; }

run_tests status_and_output_of_the_script success warning bug lock_report panic hang end_before_the_scripts
