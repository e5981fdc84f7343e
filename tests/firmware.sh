# SPDX-License-Identifier: GPL-2.0
# SeaBIOS as a guest, from the reset vector in real mode to its boot prompt: a PC's firmware finds the memory,
# the CPUs, the interrupt controllers and the timers as it has them on a board.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

device=/dev/rvisor
[ "${1:-}" = --device ] && device=$2
LOG=/tmp/firmware-log

# firmware OPTIONS...: starts SeaBIOS; its process is $guest. What it prints goes to $LOG, its lines as Unix has them.
firmware() {
	rvisor run --device "$device" --firmware /guest/seabios.bin "$@" </dev/null >$LOG 2>&1 &
	guest=$!
}

# says TEXT: SeaBIOS has printed that.
says() { check "it does not say \"$1\": $(tail -n 3 $LOG | tr -d '\r' | tr '\n' ' ')" grep -qF "$1" $LOG; }

# reaches_prompt: waits for the boot prompt and ends the guest there.
reaches_prompt() {
	wait_for 40 grep -q 'No bootable device' $LOG
	kill -TERM "$guest"
	wait "$guest"
	got=$?
	says 'No bootable device.  Retrying in 60 seconds.' || return
	check "SIGTERM ended it with $got, not 143" test "$got" -eq 143
}

test_boot_prompt() {
	firmware --memory 48M
	reaches_prompt || return
	says 'RamSize: 0x03000000' && says 'Found 1 cpu(s)' && says 'Press ESC for boot menu.'
}

# The others start by INIT and SIPI in real mode.
test_four_cpus() {
	firmware --memory 48M --cpus 4
	reaches_prompt || return
	says 'Found 4 cpu(s)'
}

run_tests boot_prompt four_cpus
