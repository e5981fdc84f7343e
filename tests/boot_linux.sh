# SPDX-License-Identifier: GPL-2.0
# The tool boots an unmodified Linux to its userspace and says truly how it ended.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

device=/dev/rvisor
[ "${1:-}" = --device ] && device=$2
LOG=/tmp/boot-log
# More words for the guest's command line.
words=''

# boot END OPTIONS...: boots the small guest, which ends as END says. Its console goes to $LOG.
boot() {
	end=$1
	shift
	rvisor run --device "$device" --kernel /guest/bzImage --initrd /guest/initramfs.cpio \
		--cmdline "console=ttyS0 loglevel=4 panic=-1 reboot=k guest.end=$end $words" "$@" </dev/null >$LOG 2>&1
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

# boot_with WORDS STATUS END: the same with more words on the command line.
boot_with() {
	words=$1
	boot_gives "$2" "$3"
	set -- $?
	words=''
	return "$1"
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

test_four_cpus() {
	boot_gives 0 poweroff --cpus 4 || return
	check "the guest does not see 4 CPUs: $(grep '^guest: Linux' $LOG)" grep -q ', 4 CPU,' $LOG
}

# The 8259s and the interval timer alone. Without ACPI a guest can reboot, and not power off.
test_without_apic() { boot_with 'noapic nolapic acpi=off' 3 reboot; }

# What is not a power-off is not reported as one; the tool's manual names the statuses.
test_reboot() { boot_gives 3 reboot; }
test_panic() { boot_gives 3 panic; }
test_triple_fault() { boot_with reboot=t 4 reboot; }

# waiting_guest FILE: starts a guest that waits, with FILE as its keyboard; its process is $guest.
waiting_guest() {
	rvisor run --device "$device" --kernel /guest/bzImage --initrd /guest/initramfs.cpio \
		--cmdline "loglevel=4 guest.end=wait" <"$1" >$LOG 2>&1 &
	guest=$!
}

test_sigterm_ends() {
	waiting_guest /dev/null
	check "no userspace: $(tail -n 3 $LOG | tr '\n' ' ')" wait_for 60 grep -q 'guest: end by wait' $LOG || { kill -9 $guest; return 1; }
	kill -TERM $guest
	wait $guest
	got=$?
	check "SIGTERM ended it with $got, not 143" test "$got" -eq 143
}

test_ctrl_a_x_ends() {
	rm -f /tmp/keys
	mkfifo /tmp/keys || return
	# Opened for both directions, so that neither end waits for the other.
	exec 4<>/tmp/keys
	waiting_guest /tmp/keys
	check "no userspace: $(tail -n 3 $LOG | tr '\n' ' ')" wait_for 60 grep -q 'guest: end by wait' $LOG || { kill -9 $guest; return 1; }
	printf '\001x' >&4
	wait $guest
	got=$?
	exec 4>&-
	check "Ctrl-A x ended it with $got, not 6" test "$got" -eq 6
}

test_two_guests_at_once() {
	(LOG=/tmp/boot-log-2; boot_gives 0 poweroff) &
	other=$!
	boot_gives 0 poweroff
	mine=$?
	check "the second guest failed" wait $other || return
	return $mine
}

# KVM and this device take turns on the CPU: neither may run the other's virtual CPU.
test_beside_kvm() {
	[ "$device" != /dev/kvm ] || { skip "this is KVM"; return; }
	[ -e /dev/kvm ] || load-kvm || return
	(device=/dev/kvm LOG=/tmp/boot-log-2; boot_gives 0 poweroff) &
	other=$!
	boot_gives 0 poweroff
	mine=$?
	check "the guest on KVM failed: $(tail -n 3 /tmp/boot-log-2 | tr '\n' ' ')" wait $other || return
	return $mine
}

run_tests poweroff memory_is_what_was_given two_cpus four_cpus without_apic reboot panic triple_fault \
	sigterm_ends ctrl_a_x_ends two_guests_at_once beside_kvm
