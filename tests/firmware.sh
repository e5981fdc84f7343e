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
	says 'qemu/e820: addr 0x0000000000000000 len 0x0000000002ff0000 [RAM]' && says 'Found 1 cpu(s)'
}

# The others start by INIT and SIPI in real mode.
test_four_cpus() {
	firmware --memory 48M --cpus 4
	reaches_prompt || return
	says 'Found 4 cpu(s)'
}

# A disk whose first sector reads the second by the firmware, sends it to the serial port and switches off.
boot_disk() {
	# xor ax, ax; mov ds, ax; mov es, ax; one sector (0x201) from number 2 to 0x7e00 by int 0x13
	code='\61\300\216\330\216\300\270\1\2\273\0\176\271\2\0\266\0\315\23'
	# mov si, 0x7e00; mov dx, 0x3f8; lodsb, out dx, al until there was a new line
	code=$code'\276\0\176\272\370\3\254\356\74\12\165\372'
	# mov dx, 0x604; mov ax, 0x3400; out dx, ax; hlt; jmp to the hlt
	code=$code'\272\4\6\270\0\64\357\364\353\375'
	rm -f /tmp/disk
	truncate -s 1M /tmp/disk
	# shellcheck disable=SC2059 # the format is the bytes
	printf "$code" | dd of=/tmp/disk conv=notrunc 2>/dev/null
	printf '\125\252' | dd of=/tmp/disk bs=1 seek=510 conv=notrunc 2>/dev/null
	echo 'sector two' | dd of=/tmp/disk bs=512 seek=1 conv=notrunc 2>/dev/null
}

test_boot_from_a_disk() {
	boot_disk
	firmware --memory 48M --disk /tmp/disk,readonly
	wait_for 40 grep -q 'powered off' $LOG
	kill -TERM "$guest" 2>/dev/null
	wait "$guest"
	got=$?
	says 'sector two' || return
	check "the guest ended with $got, not 0" test "$got" -eq 0
}

run_tests boot_prompt four_cpus boot_from_a_disk
