# SPDX-License-Identifier: GPL-2.0
# The tool boots an unmodified Linux to its userspace and says truly how it ended.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

device=/dev/rvisor
[ "${1:-}" = --device ] && device=$2
LOG=/tmp/boot-log

# boot END OPTIONS...: boots the small guest, which ends as END says. Its console goes to $LOG.
boot() {
	end=$1
	shift
	rvisor run --device "$device" --kernel /guest/bzImage --initrd /guest/initramfs.cpio \
		--cmdline "console=ttyS0 loglevel=4 panic=-1 reboot=k guest.end=$end" "$@" </dev/null >$LOG 2>&1
}

# boot_gives STATUS END OPTIONS...
boot_gives() {
	wanted=$1
	shift
	boot "$@"
	got=$?
	check "no userspace: $(tail -n 3 $LOG | tr '\n' ' ')" grep -q 'guest: userspace reached' $LOG || return
	check "rvisor run ended with $got, not $wanted" test "$got" -eq "$wanted"
}

test_poweroff() { boot_gives 0 poweroff; }

test_memory_is_what_was_given() {
	boot_gives 0 poweroff --memory 96M || return
	mib=$(sed -n 's/^guest: Linux.*, \([0-9]*\) MiB.*/\1/p' $LOG)
	check "the guest sees ${mib:-no} MiB of 96" test "${mib:-0}" -gt 60 -a "${mib:-0}" -le 96
}

test_two_cpus() {
	boot_gives 0 poweroff --cpus 2 || return
	check "the guest does not see 2 CPUs: $(grep '^guest: Linux' $LOG)" grep -q ', 2 CPU,' $LOG
}

# What is not a power-off is not reported as one; the tool's manual names the statuses.
test_reboot() {
	boot reboot
	got=$?
	check "no userspace: $(tail -n 3 $LOG | tr '\n' ' ')" grep -q 'guest: end by reboot' $LOG || return
	check "a reboot ended with $got, which is a power-off's" test "$got" -ne 0
}

test_panic() {
	boot panic
	got=$?
	check "no panic: $(tail -n 3 $LOG | tr '\n' ' ')" grep -q 'Kernel panic' $LOG || return
	check "a panic ended with $got, which is a power-off's" test "$got" -ne 0
}

test_two_guests_at_once() {
	(LOG=/tmp/boot-log-2; boot_gives 0 poweroff) &
	other=$!
	boot_gives 0 poweroff
	mine=$?
	check "the second guest failed" wait $other || return
	return $mine
}

run_tests poweroff memory_is_what_was_given two_cpus reboot panic two_guests_at_once
