# SPDX-License-Identifier: GPL-2.0
# The module unloads after all tests, and the host's kernel had nothing to complain of.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

test_unload() { check "rmmod failed after all tests" rmmod rvisor; }
test_no_complaints() {
	check "the kernel's log has warnings: $(kernel_complaints | head -n 2 | tr '\n' ' ')" test -z "$(kernel_complaints)"
}

run_tests unload no_complaints
