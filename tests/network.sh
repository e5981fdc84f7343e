# SPDX-License-Identifier: GPL-2.0
# Guests with network cards: a TAP of the host's, a bridge of two, two machines on a socket, passt; and what
# the tool says where a network can't be had.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh
. /tests/lib/guest.sh

device=/dev/rvisor
[ "${1:-}" = --device ] && device=$2

# guest NAME OPTIONS...: runs the guest with that archive to its end; its console goes to /tmp/NAME.log.
guest() {
	archive=$1
	shift
	rvisor run --device "$device" --memory 64M --kernel /guest/bzImage --initrd "/tmp/$archive.cpio" \
		--cmdline quiet "$@" </dev/null >"/tmp/$archive.log" 2>&1
}

# tail_of NAME: what to say of a guest that did not do what it should.
tail_of() { tr -d '\r' <"/tmp/$1.log" | tail -n 4 | tr '\n' ' '; }

# said NAME TEXT: the guest's console has that line.
said() { tr -d '\r' <"/tmp/$1.log" | grep -qx "$2"; }

# The sum of a file's bytes.
sum_of() { sha256sum "$1" | cut -c 1-64; }

# tap NAME ADDRESS...: a TAP that is up, with that address if one is given.
tap() {
	tunctl -t "$1" >/dev/null || return
	[ -z "${2:-}" ] || ip addr add "$2" dev "$1" || return
	ip link set "$1" up
}

test_ping_and_transfer_by_tap() {
	tap tap0 10.1.0.1/24 || return
	archive tap <<-'END'
		ip addr add 10.1.0.2/24 dev eth0
		ip link set eth0 up
		ping -c 3 -i 0.2 10.1.0.1 | grep -q ' 3 packets received' && echo "guest: pinged"
		wget -q -O /tmp/down http://10.1.0.1/data && echo "guest: down $(sha256sum </tmp/down | cut -c 1-64)"
		head -c 700000 /dev/urandom >/tmp/up
		echo "guest: up $(sha256sum </tmp/up | cut -c 1-64)"
		nc 10.1.0.1 5001 </tmp/up
		echo "guest: mac $(cat /sys/class/net/eth0/address)"
	END
	mkdir -p /tmp/www
	head -c 900000 /dev/urandom >/tmp/www/data
	httpd -p 10.1.0.1:80 -h /tmp/www -f &
	server=$!
	printf '#!/bin/sh\ncat >/tmp/uploaded\n' >/tmp/sink
	chmod 755 /tmp/sink
	timeout 60 nc -l -p 5001 -e /tmp/sink &
	sink=$!
	guest tap --net tap=tap0,mac=02:00:00:00:00:2a --metrics /tmp/metrics
	status=$?
	kill $server
	check "the run ended with $status: $(tail_of tap)" test $status -eq 0 || return
	check "no answer to three pings: $(tail_of tap)" said tap 'guest: pinged' || return
	check "what came down is not what was there: $(tail_of tap)" \
		said tap "guest: down $(sum_of /tmp/www/data)" || return
	wait_for 5 sh -c "! kill -0 $sink 2>/dev/null"
	check "what came up is not what was sent: $(tail_of tap)" said tap "guest: up $(sum_of /tmp/uploaded)" || return
	check "its address is another: $(tail_of tap)" said tap 'guest: mac 02:00:00:00:00:2a' || return
	for least in received_bytes:900000 sent_bytes:700000; do
		count=$(tail -n 1 /tmp/metrics | sed -n "s/.*\"${least%:*}\":\([0-9]*\).*/\1/p")
		check "${least%:*} is ${count:-not told}, less than ${least#*:}" test "${count:-0}" -ge "${least#*:}" || return
	done
}

# pair_archives COMMANDS: the one machine serves a file, and when the other has read it does COMMANDS and ends.
pair_archives() {
	{ cat && echo "$1"; } <<-'END' | archive first
		mkdir /tmp/www
		head -c 500000 /dev/urandom >/tmp/www/data
		echo "guest: data $(sha256sum </tmp/www/data | cut -c 1-64)"
		httpd -h /tmp/www
		timeout 60 nc -l -p 99 -e /bin/true &
		echo "guest: mac $(cat /sys/class/net/eth0/address)"
		ip addr add 10.2.0.1/24 dev eth0
		ip link set eth0 up
		echo "guest: carrier $(cat /sys/class/net/eth0/carrier)"
		wait
	END
	archive second <<-'END'
		ip addr add 10.2.0.2/24 dev eth0
		ip link set eth0 up
		tries=0
		until ping -c 1 -W 1 10.2.0.1 >/dev/null || [ $tries -gt 60 ]; do tries=$((tries + 1)); done
		ping -c 3 -i 0.2 10.2.0.1 | grep -q ' 3 packets received' && echo "guest: pinged"
		wget -q -O /tmp/down http://10.2.0.1/data && echo "guest: data $(sha256sum </tmp/down | cut -c 1-64)"
		echo "guest: mac $(cat /sys/class/net/eth0/address)"
		nc 10.2.0.1 99 </dev/null
	END
}

# pair NETWORK NETWORK [LINE COMMANDS]: two machines on these reach one another, the second from when the first has
# said LINE; then the first does COMMANDS.
pair() {
	pair_archives "${4:-}"
	guest first --net "$1" &
	other=$!
	[ -z "${3:-}" ] || check "no '$3'" wait_for 60 said first "$3" || { killall rvisor; return 1; }
	guest second --net "$2"
	status=$?
	check "the second ended with $status: $(tail_of second)" test $status -eq 0 || { killall rvisor; return 1; }
	wait $other
	status=$?
	check "the first ended with $status: $(tail_of first)" test $status -eq 0 || return
	check "the first did not answer: $(tail_of second)" said second 'guest: pinged' || return
	sum=$(tr -d '\r' </tmp/first.log | sed -n 's/^guest: data //p')
	check "what came is not what was sent: $(tail_of second)" said second "guest: data $sum" || return
	mac=$(tr -d '\r' </tmp/first.log | sed -n 's/^guest: mac //p')
	check_not "both have the address $mac" said second "guest: mac $mac"
}

test_two_guests_on_a_bridge() {
	brctl addbr br0 && ip link set br0 up || return
	tap left && tap right && brctl addif br0 left && brctl addif br0 right || return
	pair tap=left tap=right
}

# The first sees the second come and go.
test_two_guests_on_a_socket() {
	# shellcheck disable=SC2016 # for the guest's shell
	pair socket=/tmp/link socket=/tmp/link 'guest: carrier 0' '
		tries=0
		until [ "$(cat /sys/class/net/eth0/carrier)" = 0 ] || [ $tries -gt 50 ]; do
			sleep 0.2
			tries=$((tries + 1))
		done
		[ $tries -gt 50 ] || echo "guest: unplugged"
	' || return
	check "the first did not see the second go: $(tail_of first)" said first 'guest: unplugged'
}

# Without a TAP of that name there is one while the guest runs.
test_tap_is_made_and_goes() {
	archive made <<-'END'
		ip link set eth0 up
		sleep 2
	END
	guest made --net tap=made0 &
	check "no TAP came: $(tail_of made)" wait_for 20 ip addr add 10.3.0.1/24 dev made0 || return
	wait $!
	check_not "the TAP stayed" ip link show made0
}

# as_user COMMAND...: runs it as a user who is not root, on a root that is no initial RAM disk: passt makes
# namespaces of its own, and leaves that root.
as_user() {
	mkdir -p /tmp/root
	# shellcheck disable=SC2016 # for the inner shells
	unshare -m sh -c 'mount --rbind / /tmp/root && cd /tmp/root && mount --move . / &&
		exec chroot . su user -c "$*"' sh "$@"
}

test_passt() {
	[ -x /bin/passt ] || { skip "this test host has no passt"; return; }
	[ -e /proc/self/ns/ipc ] || { skip "this test host's kernel has no namespaces for System V's IPC"; return; }
	grep -q '^user:' /etc/passwd || echo 'user:x:1000:1000::/tmp:/bin/sh' >>/etc/passwd
	chmod 666 "$device"
	ip link set lo up
	archive user <<-'END'
		printf '#!/bin/sh\n[ "$1" != bound ] || ip addr add "$ip/$mask" dev eth0\n' >/tmp/lease
		printf '#!/bin/sh\ncat >/tmp/down\n' >/tmp/sink
		chmod 755 /tmp/lease /tmp/sink
		mkdir /tmp/www
		head -c 300000 /dev/urandom >/tmp/www/data
		echo "guest: data $(sha256sum </tmp/www/data | cut -c 1-64)"
		httpd -h /tmp/www
		timeout 60 nc -l -p 90 -e /tmp/sink &
		ip link set lo up
		ip link set eth0 up
		udhcpc -i eth0 -n -q -s /tmp/lease >/dev/null 2>&1 && echo "guest: has an address"
		ip route add default dev eth0
		wait
		echo "guest: down $(sha256sum </tmp/down | cut -c 1-64)"
	END
	head -c 300000 /dev/urandom >/tmp/up
	as_user "rvisor run --device $device --memory 64M --kernel /guest/bzImage --initrd /tmp/user.cpio --cmdline quiet \
		--net user,forward=8080:80,forward=9090:90" </dev/null >/tmp/user.log 2>&1 &
	machine=$!
	wait_for 60 grep -q 'guest: has an address' /tmp/user.log
	timeout 60 wget -q -O /tmp/data http://127.0.0.1:8080/data
	timeout 60 nc 127.0.0.1 9090 </tmp/up
	wait $machine
	status=$?
	check "the run ended with $status: $(tail_of user)" test $status -eq 0 || return
	check "no address by DHCP: $(tail_of user)" said user 'guest: has an address' || return
	check "what came from it is not what it had: $(tail_of user)" said user "guest: data $(sum_of /tmp/data)" || return
	check "what came to it is not what was sent: $(tail_of user)" said user "guest: down $(sum_of /tmp/up)" || return
	check_not "passt is still there" wait_for 2 pidof passt
}

# refused WORDS OPTIONS...: the tool refuses with one line that has WORDS, and status 2.
refused() {
	words=$1
	shift
	rvisor run --device "$device" --kernel /guest/bzImage "$@" </dev/null >/tmp/refused 2>&1
	status=$?
	check "status $status for $*: $(head -n 2 /tmp/refused)" test $status -eq 2 || return
	check "more than a line for $*: $(cat /tmp/refused)" test "$(wc -l </tmp/refused)" -eq 1 || return
	check "no '$words' for $*: $(cat /tmp/refused)" grep -q "$words" /tmp/refused
}

test_networks_that_can_not_be_had() {
	refused 'lo is no TAP' --net tap=lo || return
	tap busy || return
	archive waits <<-'END'
		sleep 1000
	END
	guest waits --net tap=busy &
	holder=$!
	wait_for 20 grep -q . /sys/class/net/busy/carrier
	wait_for 20 grep -q 1 /sys/class/net/busy/carrier
	refused 'TAP busy is in use by another program; end that one' --net tap=busy
	set -- $?
	killall rvisor
	wait $holder
	[ "$1" -eq 0 ] || return
	(env PATH=/nowhere /bin/rvisor run --device "$device" --kernel /guest/bzImage --net user 2>/tmp/refused)
	check "no word of passt: $(cat /tmp/refused)" grep -q 'needs passt, which is not installed' /tmp/refused
}

# refused_to_user WORDS NAME: a user who is not root can't have that TAP.
refused_to_user() {
	su user -c "rvisor run --kernel /guest/bzImage --net tap=$2" </dev/null >/tmp/refused 2>&1
	status=$?
	check "status $status for $2: $(cat /tmp/refused)" test $status -eq 2 || return
	check "no '$1': $(cat /tmp/refused)" grep -q "$1" /tmp/refused
}

test_networks_of_others() {
	grep -q '^user:' /etc/passwd || echo 'user:x:1000:1000::/tmp:/bin/sh' >>/etc/passwd
	tap roots || return
	refused_to_user 'needs /dev/net/tun: Permission denied' roots || return
	chmod 666 /dev/net/tun
	refused_to_user 'TAP roots is not yours; ' roots || return
	refused_to_user 'there is no TAP missing, and you may not make one; ' missing
}

run_tests ping_and_transfer_by_tap two_guests_on_a_bridge two_guests_on_a_socket tap_is_made_and_goes passt \
	networks_that_can_not_be_had networks_of_others
