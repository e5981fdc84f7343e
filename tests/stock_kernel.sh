# SPDX-License-Identifier: GPL-2.0
# The host is what the tests behind this one are meant for: Debian's kernel as users have it, on a CPU with CET.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

test_debians() { check "this is $(uname -r)" grep -q '(debian-kernel@lists.debian.org)' /proc/version; }
test_dynamic_preemption() { check "no word of it in the log" sh -c "dmesg | grep -q 'Dynamic Preempt: '"; }
test_mitigations() {
	file=/sys/devices/system/cpu/vulnerabilities/spectre_v2
	check "spectre_v2: $(cat $file)" grep -q '^Mitigation: ' $file
}
test_indirect_branch_tracking() {
	check "no word of it in the log" sh -c "dmesg | grep -q 'Indirect Branch Tracking enabled'"
}

run_tests debians dynamic_preemption mitigations indirect_branch_tracking
