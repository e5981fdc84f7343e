# SPDX-License-Identifier: GPL-2.0
# Different systems at once, each as others have made it: Debian 13 on a disk, started as a kernel and by GRUB
# from firmware, Linux of 32 bits, memtest86+. One more crashes on purpose, and the others don't notice. Debian's
# disk is whole afterwards.
# They lie in /guests (scripts/guests) and /disk (scripts/debian-disk).
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh
. /tests/lib/guest.sh

device=/dev/rvisor
[ "${1:-}" = --device ] && device=$2

# machine NAME OPTIONS...: starts it in the background, its console between /tmp/NAME.in and /tmp/NAME.log; its exit
# status goes to /tmp/NAME.status.
machine() {
	name=$1
	shift
	rm -f "/tmp/$name.in" "/tmp/$name.status"
	mkfifo "/tmp/$name.in"
	{
		# Open for writing too, so that it does not end.
		rvisor run --device "$device" --name "$name" "$@" <>"/tmp/$name.in" >"/tmp/$name.log" 2>&1
		echo $? >"/tmp/$name.status"
	} &
}

# type_at NAME WORDS...: a line for its console.
type_at() {
	name=$1
	shift
	printf '%s\n' "$*" >"/tmp/$name.in"
}

shows() { tr -d '\r' <"/tmp/$1.log" | grep -q "$2"; }
has_ended() { [ -e "/tmp/$1.status" ]; }
end_of() { tr -d '\r' <"/tmp/$1.log" | tail -n 3 | tr '\n' ' '; }

# patiently SECONDS COMMAND...: tries once a second until the command succeeds.
patiently() {
	left=$1
	shift
	until "$@"; do
		[ "$left" -gt 0 ] || return 1
		left=$((left - 1))
		sleep 1
	done
}

# awaits NAME TEXT SECONDS: its console shows that before it ends.
awaits() {
	check "$1 does not show \"$2\": $(end_of "$1")" patiently "$3" shows "$1" "$2"
}

# ended NAME STATUS SECONDS: it ends so.
ended() {
	check "$1 does not end: $(end_of "$1")" patiently "$3" has_ended "$1" || return
	status=$(cat "/tmp/$1.status")
	check "$1 ended with $status, not $2: $(end_of "$1")" test "$status" -eq "$2"
}

# A network for Debian, which asks by DHCP.
network() {
	tunctl -t tap0 >/dev/null || return
	ip addr add 10.9.0.1/24 dev tap0 || return
	ip link set tap0 up || return
	: >/tmp/leases
	printf '%s\n' 'start 10.9.0.10' 'end 10.9.0.10' 'interface tap0' 'option subnet 255.255.255.0' \
		'lease_file /tmp/leases' 'pidfile /tmp/udhcpd.pid' >/tmp/udhcpd.conf
	udhcpd /tmp/udhcpd.conf
}

start_all() {
	network || { why "no network"; return 1; }
	cp /disk/debian.qcow2 /tmp/grub.qcow2 || return
	machine debian --kernel /disk/vmlinuz --initrd /disk/initrd.img --cmdline 'root=LABEL=root ro quiet' \
		--disk /disk/debian.qcow2 --net tap=tap0 --memory 384M --cpu-share 200
	machine grub --firmware /guest/seabios.bin --disk /tmp/grub.qcow2 --memory 384M --cpu-share 200
	machine linux32 --kernel /guests/linux-686 --initrd /guests/initramfs-i386.cpio --memory 128M \
		--cmdline 'guest.work guest.end=wait'
	machine memtest --kernel /guests/memtest.bin --memory 8M --cpu-share 10
}

# All four come up, with one among them that crashes: a triple fault, as often as the others give it time to.
test_together() {
	check "no cgroup2" mount -t cgroup2 none /sys/fs/cgroup || return
	start_all || return
	machine crash --kernel /guest/bzImage --initrd /guest/initramfs.cpio --memory 64M \
		--cmdline 'quiet reboot=t guest.end=reboot'
	ended crash 4 120 || return
	awaits linux32 'guest: end by wait' 240 || return
	awaits grub 'GRUB: starting Debian' 240 || return
	awaits memtest 'Errors:' 240 || return
	awaits debian 'guest login:' 600 || return
	awaits grub 'guest login:' 600 || return
	check "not all run: $(rvisor ps)" test "$(rvisor ps | grep -c running)" -eq 4
}

# Debian is asked at its console: its network is up both ways, its disk written, its system in order.
test_debian_works() {
	type_at debian root
	sleep 8
	type_at debian 'stty -echo; ip -color=never -br addr show eth0 | tr -s " "; systemctl is-system-running --wait'
	awaits debian 'eth0 UP 10.9.0.10/24' 60 || return
	awaits debian '^running' 60 || return
	check "it does not answer a ping" ping -c 1 -W 10 10.9.0.10 || return
	head -c 300000 /dev/urandom >/tmp/sent
	nc -l -p 7000 </tmp/sent &
	type_at debian 'cat </dev/tcp/10.9.0.1/7000 >/root/got; sync; sha256sum /root/got'
	awaits debian "$(sha256sum /tmp/sent | cut -c 1-64)" 60
}

# Both are asked by the power button and end cleanly; memtest86+ knows no such thing.
test_stop() {
	rvisor stop debian --timeout 120 || { why "rvisor stop debian: $?"; return 1; }
	rvisor stop grub --timeout 120 || { why "rvisor stop grub: $?"; return 1; }
	ended debian 0 10 || return
	ended grub 0 10 || return
	errors=$(sed 's/\x1b\[[0-9;]*[A-Za-z]/\n/g' /tmp/memtest.log | sed -n 's/.*Errors: *\([0-9]*\).*/\1/p' | sort -n | tail -n 1)
	check "memtest86+ found ${errors:-an unknown number of} errors" test "${errors:-1}" -eq 0 || return
	rvisor kill memtest || return
	rvisor kill linux32 || return
	ended memtest 8 10 || return
	ended linux32 8 10
}

# Debian's own e2fsck, in a small guest that has the disk to read, finds nothing wrong.
test_disk_is_whole() {
	archive fsck /e2fsck <<-'END'
		e2fsck -f -n /dev/vda1
		echo "e2fsck ended with $?"
	END
	for name in disk/debian tmp/grub; do
		rvisor run --device "$device" --kernel /guest/bzImage --initrd /tmp/fsck.cpio --memory 192M \
			--disk "/$name.qcow2,readonly" --cmdline quiet </dev/null >/tmp/fsck.log 2>&1
		check "/$name.qcow2: $(end_of fsck)" grep -q 'e2fsck ended with 0' /tmp/fsck.log || return
	done
}

run_tests together debian_works stop disk_is_whole
