# SPDX-License-Identifier: GPL-2.0
# The module loads and unloads twice, its node comes and goes with it, and it stays while it is in use.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

MODULE=/modules/rvisor.ko
NODE=/dev/rvisor

loaded() { grep -q '^rvisor ' /proc/modules; }
free_memory() { awk '/MemFree/ { print $2 }' /proc/meminfo; }

load_and_unload() {
	check "insmod failed: $(dmesg | tail -n 3)" insmod $MODULE || return
	check "$NODE is not there after insmod" test -c $NODE || return
	check "rmmod failed" rmmod rvisor || return
	check_not "$NODE is still there after rmmod" test -e $NODE
}

test_load_unload() { load_and_unload; }
test_load_unload_again() { load_and_unload; }

test_twice_is_refused() {
	insmod $MODULE || return
	check_not "a second insmod succeeded" insmod $MODULE 2>/dev/null || return
	rmmod rvisor
}

test_open_node_holds_the_module() {
	insmod $MODULE || return
	exec 3<>$NODE || return
	check_not "rmmod succeeded with the node open" rmmod rvisor 2>/dev/null || return
	exec 3>&-
	check "rmmod failed after the node was closed" rmmod rvisor
}

test_living_vm_holds_the_module() {
	insmod $MODULE || return
	rvisor run --kernel /guest/bzImage --initrd /guest/initramfs.cpio --cmdline 'console=ttyS0 guest.end=wait' \
		</dev/null >/tmp/guest-log 2>&1 &
	guest=$!
	check "the guest did not reach userspace: $(tail -n 3 /tmp/guest-log)" \
		wait_for 60 grep -q 'guest: end by wait' /tmp/guest-log || { kill -9 $guest; wait $guest; rmmod rvisor; return 1; }
	check_not "rmmod succeeded under a living VM" rmmod rvisor 2>/dev/null || return
	kill -9 $guest
	wait $guest 2>/dev/null
	check "rmmod failed after the VM's end" wait_for 5 rmmod rvisor
}

# Loading once may leave caches of the kernel's behind; loading ten times more must not.
test_no_memory_stays_behind() {
	before=$(free_memory)
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		insmod $MODULE && rmmod rvisor || return
	done
	echo 3 >/proc/sys/vm/drop_caches
	after=$(free_memory)
	check "$((before - after)) KiB are gone after 10 rounds" test $((before - after)) -lt 512
}

test_beside_kvm() {
	load-kvm || return
	check "insmod failed beside KVM" insmod $MODULE || return
	check "rmmod failed beside KVM" rmmod rvisor || return
	check "KVM did not unload" rmmod kvm-intel || return
	rmmod kvm && rmmod irqbypass
}

test_no_complaints() {
	check "the kernel's log has warnings: $(kernel_complaints | head -n 2 | tr '\n' ' ')" test -z "$(kernel_complaints)"
}

dmesg -c >/dev/null
run_tests load_unload load_unload_again twice_is_refused open_node_holds_the_module \
	living_vm_holds_the_module no_memory_stays_behind beside_kvm no_complaints
