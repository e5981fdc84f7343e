# SPDX-License-Identifier: GPL-2.0
# On a CPU without VMX the module refuses to load and says why, and the tool's check says the same.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

test_no_vmx_here() { check_not "this CPU has VMX: the test proves nothing" grep -qw vmx /proc/cpuinfo; }

test_module_refuses() {
	dmesg -c >/dev/null
	check_not "insmod succeeded" insmod /modules/rvisor.ko 2>/dev/null || return
	check "no message names VMX: $(dmesg | tail -n 2 | tr '\n' ' ')" sh -c "dmesg | grep -q 'rvisor: .*VMX'" || return
	check_not "the node is there" test -e /dev/rvisor || return
	check_not "the module is loaded" grep -q '^rvisor ' /proc/modules
}

test_check_says_so() {
	rvisor check >/tmp/check 2>&1
	status=$?
	check "rvisor check ended with $status, not 1" test $status -eq 1 || return
	check "rvisor check names no VMX: $(head -n 3 /tmp/check | tr '\n' ' ')" grep -q VMX /tmp/check
}

test_run_names_the_cause() {
	rvisor run --kernel /guest/bzImage >/tmp/run 2>&1
	status=$?
	check "rvisor run ended with $status, not 2" test $status -eq 2 || return
	check "not one line: $(wc -l </tmp/run)" test "$(wc -l </tmp/run)" -eq 1 || return
	check "the line does not name /dev/rvisor: $(cat /tmp/run)" grep -q /dev/rvisor /tmp/run
}

test_no_complaints() {
	check "the kernel's log has warnings: $(kernel_complaints | grep -v 'rvisor: ' | head -n 2)" \
		test -z "$(kernel_complaints | grep -v 'rvisor: ')"
}

run_tests no_vmx_here module_refuses check_says_so run_names_the_cause no_complaints
