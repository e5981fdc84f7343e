# SPDX-License-Identifier: GPL-2.0
# What others have made and know nothing of this hypervisor, as guests: Debian's stock kernels of 64 and 32 bits
# work in their userspace, memtest86+ finds no error in the guest's memory, SeaBIOS resets the machine.
# They lie in /guests (scripts/guests).
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

device=/dev/rvisor
[ "${1:-}" = --device ] && device=$2
LOG=/tmp/guests-log
# What a guest's work is: the sum over that many zeros, which the test host works out by itself.
WORK=2097152

# report NAME: the words behind "guest: NAME" in the log.
report() { sed -n "s/\r\$//; s/^guest: $1 //p" $LOG; }

# between LEAST VALUE MOST: VALUE is a number from LEAST to MOST.
between() { [ -n "$2" ] && [ "$1" -le "$2" ] && [ "$2" -le "$3" ]; }

# complaints: what a kernel says of a machine that is not right.
complaints() { grep -E 'unchecked MSR|Call Trace|BUG:|WARNING:|rcu.*stall|soft lockup|clocksource.*unstable' $LOG; }

# worked CPUS: each CPU did its work, by itself.
worked() {
	sum=$(head -c $WORK /dev/zero | sha256sum | cut -c 1-64)
	cpu=0
	while [ $cpu -lt "$1" ]; do
		words=$(report "CPU $cpu worked")
		check "CPU $cpu did not work: ${words:-no word of it}" test "${words#* ticks: }" = "$sum" || return
		check "CPU $cpu was idle meanwhile, it says" test "${words%% *}" -gt 0 || return
		cpu=$((cpu + 1))
	done
}

# linux KERNEL INITRAMFS MACHINE CPUS END STATUS: boots it and looks at all that its init reports.
linux() {
	began=$(date +%s)
	rvisor run --device "$device" --kernel "/guests/$1" --initrd "/$2" --cpus "$4" --memory 256M \
		--cmdline "loglevel=5 guest.work guest.end=$5" </dev/null >$LOG 2>&1
	got=$?
	check "no userspace: $(tail -n 3 $LOG | tr '\n' ' ')" grep -q 'guest: userspace reached' $LOG || return
	check "not this machine: $(report Linux)" grep -q "guest: Linux .* $3, $4 CPU," $LOG || return
	check "its kernel complains: $(complaints | head -n 2 | tr '\n' ' ')" test -z "$(complaints)" || return
	clock=$(report clock)
	check "the guest's clock is at ${clock:-nothing} between $began and $(date +%s)" \
		between "$began" "$clock" "$(date +%s)" || return
	slept=$(report slept)
	check "a second's sleep took ${slept:-no number of} hundredths" between 100 "${slept%% *}" 250 || return
	worked "$4" || return
	check "rvisor run ended with $got, not $6" test $got -eq "$6"
}

test_debian_one_cpu() { linux linux-cloud guest/initramfs.cpio x86_64 1 poweroff 0; }
test_debian_two_cpus() { linux linux-cloud guest/initramfs.cpio x86_64 2 reboot 3; }
test_debian_four_cpus() { linux linux-cloud guest/initramfs.cpio x86_64 4 poweroff 0; }
# Page tables of two levels.
test_debian_32_bits() { linux linux-686 guests/initramfs-i386.cpio i686 1 poweroff 0; }
# Of three.
test_debian_32_bits_pae() { linux linux-686-pae guests/initramfs-i386.cpio i686 2 reboot 3; }

# screen: what memtest86+ has drawn on its serial terminal, an item a line.
screen() { sed "s/$(printf '\033')\[[0-9;]*[A-Za-z]/\n/g" $LOG; }

# Seconds that memtest86+ has tested, by its own clock.
tested() { screen | awk -F '[: ]+' '/\| Time: .*[0-9]/ { sub(/.*Time: */, ""); n = $1 * 3600 + $2 * 60 + $3 } END { print n + 0 }'; }

# memtest CPUS SECONDS KINDS TEXT: it tests so long, in that many ways of its at least; its screen has shown TEXT.
memtest() {
	rvisor run --device "$device" --kernel /guests/memtest.bin --memory 8M --cpus "$1" </dev/null >$LOG 2>&1 &
	guest=$!
	rounds=0
	while [ "$(tested)" -lt "$2" ] && [ $rounds -lt "$2" ] && kill -0 $guest 2>/dev/null; do
		sleep 3
		rounds=$((rounds + 1))
	done
	kill -TERM $guest
	wait $guest
	got=$?
	check "it ended with $got, not by SIGTERM: $(tail -n 3 $LOG)" test $got -eq 143 || return
	check "its clock came to $(tested) s of $2" test "$(tested)" -ge "$2" || return
	check "it does not say \"$4\"" grep -qF "$4" $LOG || return
	kinds=$(screen | sed -n 's/^ *#\([0-9]*\) .*/\1/p' | sort -u | wc -l)
	check "it came to $kinds kinds of tests" test "$kinds" -ge "$3" || return
	errors=$(screen | sed -n 's/.*Errors: *\([0-9]*\).*/\1/p' | sort -n | tail -n 1)
	check "it found ${errors:-an unknown number of} errors" test "${errors:-1}" -eq 0
}

test_memtest() { memtest 1 60 5 '1 Cores 1 Threads'; }
# It starts the other by INIT and SIPI, and both test at a time.
test_memtest_two_cpus() {
	# Not understood: the same program with one CPU runs there.
	[ "$device" != /dev/kvm ] || { skip "on KVM in the test host it stays silent"; return; }
	memtest 2 20 3 '2 Cores 2 Threads    SMP: 2T (PAR)'
}

# Nothing to boot from: SeaBIOS waits a minute for it, halted between the timer's interrupts, and resets the machine.
test_seabios_reboots() {
	timeout 120 rvisor run --device "$device" --firmware /guest/seabios.bin --memory 48M </dev/null >$LOG 2>&1
	got=$?
	check "no reset: $(tail -n 3 $LOG | tr '\n' ' ')" grep -q 'Rebooting' $LOG || return
	check "the reset ended it with $got, not 3" test $got -eq 3
}

run_tests debian_one_cpu debian_two_cpus debian_four_cpus debian_32_bits debian_32_bits_pae \
	memtest memtest_two_cpus seabios_reboots
