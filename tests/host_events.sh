# SPDX-License-Identifier: GPL-2.0
# What happens to the host while guests run: an NMI, CPUs that go and come back, suspend. The guests go on and
# keep their state, the host gets what is its own, and VMX is where it should be. Wants two CPUs.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

DEVICE=/dev/rvisor
MODULE=/modules/rvisor.ko
CPU1=/sys/devices/system/cpu/cpu1/online

# vmxe CPU: CR4.VMXE there.
vmxe() {
	taskset $((1 << $1)) insmod /modules/observer.ko || return
	rmmod observer
	dmesg | sed -n 's/.*observer: vmxe=//p' | tail -n 1
}

vmxe_is() { check "CR4.VMXE of CPU $1 is not $2 $3" test "$(vmxe "$1")" = "$2"; }

# start_guests: one on each CPU and one on both; each keeps its number of rounds in /tmp/rounds.N.
start_guests() {
	guests=''
	for mask in 1 2 3; do
		rm -f /tmp/rounds.$mask
		taskset $mask looper --device $DEVICE /tmp/rounds.$mask 2>/tmp/looper.$mask &
		guests="$guests $!"
	done
	guests_go_on "at the start"
}

stop_guests() {
	# shellcheck disable=SC2086 # a list
	kill -9 $guests
	# shellcheck disable=SC2086
	wait $guests 2>/dev/null
	:
}

# more_than NUMBER FILE
more_than() { [ "$(cat "$2" 2>/dev/null || echo 0)" -gt "$1" ] 2>/dev/null; }

# guests_go_on WHEN: all of them make rounds.
guests_go_on() {
	for mask in 1 2 3; do
		rounds=$(cat /tmp/rounds.$mask 2>/dev/null || echo 0)
		check "the guest on CPUs $mask stands still $1 at round $rounds: $(cat /tmp/looper.$mask)" \
			wait_for 20 more_than $((rounds + 20)) /tmp/rounds.$mask || return
	done
}

# The kernel warns of each thread that is bound to a CPU which goes, and Bochs's firmware resets the TSC.
complaints() {
	kernel_complaints | grep -v -e 'no longer affine to cpu' -e 'TSC ADJUST differs' | head -n 2 | tr '\n' ' '
}
no_complaints() { check "the kernel's log has warnings $1: $(complaints)" test -z "$(complaints)"; }

test_two_cpus_here() { check "this host has $(nproc) CPU: the tests prove little" test "$(nproc)" -eq 2; }

test_vmx_is_on_while_loaded() {
	for cpu in 0 1; do vmxe_is $cpu 0 "before insmod" || return; done
	insmod $MODULE || return
	for cpu in 0 1; do vmxe_is $cpu 1 "after insmod" || return; done
	rmmod rvisor || return
	for cpu in 0 1; do vmxe_is $cpu 0 "after rmmod" || return; done
	insmod $MODULE
}

# log_has PATTERN
log_has() { dmesg | grep -q "$1"; }

# given_on PID: an NMI came while the guest's thread ran, and "int 2" in the module gave it to the host.
given_on() {
	dmesg -c >/dev/null
	taskset 1 sh -c 'echo l >/proc/sysrq-trigger'
	wait_for 3 log_has 'NMI backtrace for cpu 1' && wait_for 1 log_has " PID: $1 " && wait_for 1 log_has 'RIP: 0010:.*rvisor'
}

nmi_reaches_the_host() {
	# Another thread may have the CPU at the moment.
	for _ in 1 2 3 4 5; do
		given_on "$1" && break
	done
	check "no NMI made the guest exit and was given to the host" log_has 'RIP: 0010:.*rvisor' || return
	rounds=$(cat /tmp/rounds.2)
	check "the guest stands still at round $rounds: $(cat /tmp/looper.2)" \
		wait_for 20 more_than $((rounds + 20)) /tmp/rounds.2
}

# SysRq "l" sends an NMI to all other CPUs: each writes where it is into the log.
test_nmi_is_the_hosts() {
	rm -f /tmp/rounds.2
	taskset 2 looper --device $DEVICE /tmp/rounds.2 2>/tmp/looper.2 &
	guest=$!
	check "the guest does not start: $(cat /tmp/looper.2)" wait_for 20 more_than 20 /tmp/rounds.2 || return
	dmesg -c >/dev/null
	# What it writes must not look like the kernel's own complaint to who reads the console.
	dmesg -n 1
	echo 1 >/proc/sys/kernel/sysrq
	nmi_reaches_the_host $guest
	status=$?
	kill -9 $guest
	wait $guest 2>/dev/null
	dmesg -c >/dev/null
	dmesg -n 5
	return $status
}

test_cpu_goes_and_comes_back() {
	start_guests || return
	for round in 1 2 3; do
		echo 0 >$CPU1 || return
		guests_go_on "with CPU 1 gone, time $round" || return
		echo 1 >$CPU1 || return
		vmxe_is 1 1 "after it came back" || return
		# What was bound to the CPU that went goes back there.
		taskset -p 2 "$(echo "$guests" | cut -d' ' -f3)" >/dev/null || return
		guests_go_on "with CPU 1 back, time $round" || return
	done
	stop_guests
	no_complaints "after the CPU came back"
}

test_guest_made_without_the_cpu() {
	echo 0 >$CPU1 || return
	rm -f /tmp/rounds.1
	looper --device $DEVICE /tmp/rounds.1 2>/tmp/looper.1 &
	guest=$!
	wait_for 20 more_than 20 /tmp/rounds.1
	echo 1 >$CPU1 || return
	taskset -p 2 $guest >/dev/null || return
	rounds=$(cat /tmp/rounds.1)
	check "the guest does not go on there: $(cat /tmp/looper.1)" \
		wait_for 20 more_than $((rounds + 20)) /tmp/rounds.1 || return
	kill -9 $guest
	wait $guest 2>/dev/null
	no_complaints "after a guest moved to a new CPU"
}

test_unloaded_without_the_cpu() {
	echo 0 >$CPU1 || return
	rmmod rvisor || return
	echo 1 >$CPU1 || return
	for cpu in 0 1; do vmxe_is $cpu 0 "after rmmod" || return; done
	echo 0 >$CPU1 || return
	insmod $MODULE || return
	echo 1 >$CPU1 || return
	for cpu in 0 1; do vmxe_is $cpu 1 "after insmod" || return; done
}

# suspended TEST: a suspend of which the kernel carries out as much as /sys/power/pm_test says.
suspended() {
	echo "$1" >/sys/power/pm_test || return
	rm -f /tmp/suspend-log
	dmesg -c >/dev/null
	# In a subshell: the status of a write that is refused.
	check "the host does not suspend ($1)" sh -c 'echo mem >/sys/power/state' || return
	check "there was no suspend ($1)" sh -c "dmesg | grep -q 'PM: suspend exit'"
}

test_suspend_in_steps() {
	[ -e /sys/power/pm_test ] || { skip "this kernel has no pm_test"; return; }
	echo 1 >/sys/module/suspend/parameters/pm_test_delay
	start_guests || return
	for step in freezer devices platform processors core; do
		suspended $step || return
		guests_go_on "after a suspend as far as $step" || return
		for cpu in 0 1; do vmxe_is $cpu 1 "after $step" || return; done
	done
	stop_guests
	no_complaints "after the suspends"
}

# Bochs resets the machine as the firmware of a real one does when it wakes up: VMX is off then.
test_suspend_to_memory() {
	grep -qw mem /sys/power/state || { skip "this host has no suspend to memory"; return; }
	grep -qw 'rvisor.host=bochs' /proc/cmdline || { skip "nothing would wake the machine up"; return; }
	start_guests || return
	suspended none || return
	guests_go_on "after suspend to memory" || return
	for cpu in 0 1; do vmxe_is $cpu 1 "after suspend to memory" || return; done
	stop_guests
	no_complaints "after suspend to memory"
}

test_unload() {
	check "rmmod failed" rmmod rvisor || return
	for cpu in 0 1; do vmxe_is $cpu 0 "at the end" || return; done
}

run_tests two_cpus_here vmx_is_on_while_loaded nmi_is_the_hosts cpu_goes_and_comes_back \
	guest_made_without_the_cpu unloaded_without_the_cpu suspend_in_steps suspend_to_memory unload
