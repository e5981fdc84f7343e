# SPDX-License-Identifier: GPL-2.0
# The module loads, for the tests behind this one.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

test_load() { check "insmod failed: $(dmesg | tail -n 2 | tr '\n' ' ')" insmod /modules/rvisor.ko; }

dmesg -c >/dev/null
run_tests load
