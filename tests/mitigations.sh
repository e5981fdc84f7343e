# SPDX-License-Identifier: GPL-2.0
# The module does what the host's kernel does, and the host keeps its own IA32_SPEC_CTRL. The module is loaded.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

FLAWS=/sys/devices/system/cpu/vulnerabilities
planned=$(dmesg | sed -n 's/.*rvisor: mitigations: //p' | tail -n 1)
# What the kernel said of its boot is not ours.
dmesg -c >/dev/null

# follows NAME FILE PATTERN: the plan has NAME where the kernel's FILE says PATTERN, and only there.
follows() {
	if grep -q "$3" "$FLAWS/$2" 2>/dev/null; then
		check "$2 is \"$(cat "$FLAWS/$2")\" and the module does \"$planned\"" \
			sh -c "echo '$planned' | grep -q '$1'"
	else
		check_not "$2 is \"$(cat "$FLAWS/$2" 2>/dev/null)\" and the module does \"$planned\"" \
			sh -c "echo '$planned' | grep -q '$1'"
	fi
}

test_plan_is_told() { check "the log does not tell the plan" test -n "$planned"; }
test_rsb_filling_as_the_kernel() { follows 'RSB filling' spectre_v2 'RSB filling'; }
test_verw_as_the_kernel() { follows 'VERW' mds 'Clear CPU buffers\|Mitigation: Clear'; }
test_bhb_as_the_kernel() { follows 'BHB clearing' spectre_v2 'KVM: SW loop'; }
test_one_call_as_the_kernel() { follows 'one CALL' spectre_v2 'PBRSB-eIBRS: SW sequence'; }
test_l1d_as_the_kernel() { follows 'L1D flush' l1tf 'Mitigation'; }

# spec_ctrl: what IA32_SPEC_CTRL holds in the host.
spec_ctrl() {
	insmod /modules/observer.ko || return
	rmmod observer
	dmesg | sed -n 's/.*observer: spec_ctrl=//p' | tail -n 1
}

# Guests that set it to values of their own come and go; the host's is what it was.
test_host_keeps_its_spec_ctrl() {
	before=$(spec_ctrl)
	[ -n "$before" ] || { skip "this CPU has no IA32_SPEC_CTRL"; return; }
	test_speculation --device /dev/rvisor spec_ctrl spec_ctrl_apart >/tmp/speculation || return
	check "the guests did not run: $(grep -v '^ok' /tmp/speculation | tail -n 1)" grep -q '^ok 2 spec_ctrl_apart$' /tmp/speculation || return
	check "it was $before and is $(spec_ctrl)" test "$(spec_ctrl)" = "$before"
}

test_no_complaints() {
	check "the kernel's log has warnings: $(kernel_complaints | head -n 2 | tr '\n' ' ')" test -z "$(kernel_complaints)"
}

run_tests plan_is_told rsb_filling_as_the_kernel verw_as_the_kernel bhb_as_the_kernel one_call_as_the_kernel \
	l1d_as_the_kernel host_keeps_its_spec_ctrl no_complaints
