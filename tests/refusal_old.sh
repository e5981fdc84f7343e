# SPDX-License-Identifier: GPL-2.0
# On a CPU of 2009, with VMX but without unrestricted guest mode, the module refuses to load and names that;
# the tool's check says the same.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

test_vmx_here() { check "this CPU has no VMX: the test proves nothing" grep -qw vmx /proc/cpuinfo; }

test_module_names_the_feature() {
	dmesg -c >/dev/null
	check_not "insmod succeeded" insmod /modules/rvisor.ko 2>/dev/null || return
	check "the message is not on unrestricted guests: $(dmesg | tail -n 1)" \
		sh -c "dmesg | grep -q 'rvisor: .*no unrestricted guest'" || return
	check_not "the node is there" test -e /dev/rvisor || return
	check_not "the module is loaded" grep -q '^rvisor ' /proc/modules
}

test_vmx_is_left_off() {
	insmod /modules/observer.ko || return
	rmmod observer
	check "CR4.VMXE is set after the refusal" sh -c "dmesg | grep -q 'observer: vmxe=0'"
}

test_check_names_the_feature() {
	rvisor check >/tmp/check 2>&1
	status=$?
	check "rvisor check ended with $status, not 1" test $status -eq 1 || return
	check "rvisor check does not name it: $(head -n 3 /tmp/check | tr '\n' ' ')" \
		grep -q 'FAIL.*unrestricted guest' /tmp/check
}

run_tests vmx_here module_names_the_feature vmx_is_left_off check_names_the_feature
