# SPDX-License-Identifier: GPL-2.0
# The virtio console, and what of a guest's output a terminal gets.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh
. /tests/lib/guest.sh

device=/dev/rvisor
[ "${1:-}" = --device ] && device=$2

MACHINE="rvisor run --device $device --memory 64M --kernel /guest/bzImage --initrd /tmp/console.cpio --cmdline quiet"

# tail_of FILE: what to say of a run that did not do what it should.
tail_of() { tr -d '\r\033' <"$1" | tail -n 4 | tr '\n' ' '; }

# The guest reads a long line and writes it back, with its sum.
test_virtio_console() {
	archive console <<-'END'
		stty -F /dev/hvc0 -echo
		echo "guest: ready"
		read -r line </dev/hvc0
		echo "guest: read $(echo "$line" | sha256sum | cut -c 1-64)"
		i=0
		while [ $i -lt 500 ]; do
			echo "guest: line $i"
			i=$((i + 1))
		done
	END
	rm -f /tmp/keys
	mkfifo /tmp/keys || return
	exec 4<>/tmp/keys
	$MACHINE --console virtio <&4 >/tmp/console.log 2>&1 &
	machine=$!
	check "it does not become ready: $(tail_of /tmp/console.log)" \
		wait_for 20 grep -q 'guest: ready' /tmp/console.log || { kill -9 $machine; exec 4>&-; return 1; }
	line=$(head -c 900 /dev/urandom | od -A n -t x1 | tr -d ' \n')
	echo "$line" >&4
	wait $machine
	status=$?
	exec 4>&-
	check "the run ended with $status: $(tail_of /tmp/console.log)" test $status -eq 0 || return
	sum=$(echo "$line" | sha256sum | cut -c 1-64)
	check "it read another line: $(tail_of /tmp/console.log)" grep -q "guest: read $sum" /tmp/console.log || return
	check "lines are missing" test "$(grep -c '^guest: line [0-9]*.$' /tmp/console.log)" -eq 500
}

# on_terminal WORDS: runs the command on a terminal of its own; all that this one gets goes to /tmp/screen.
on_terminal() {
	printf '#!/bin/sh\nexport LC_ALL=C.UTF-8\n%s\n' "$1" >/tmp/session
	chmod 755 /tmp/session
	ip link set lo up
	telnetd -F -K -b 127.0.0.1 -p 2323 -l /tmp/session &
	server=$!
	rm -f /tmp/nothing
	mkfifo /tmp/nothing
	exec 5<>/tmp/nothing
	wait_for 10 grep -q ' 0100007F:0913 ' /proc/net/tcp
	timeout 60 nc 127.0.0.1 2323 <&5 >/tmp/screen
	exec 5>&-
	kill $server
}

# has SEQUENCE: the screen got it, in printf's notation.
has() { grep -qF "$(printf '%b' "$1")" /tmp/screen; }

test_output_to_a_terminal_is_filtered() {
	archive console <<-'END'
		printf 'guest: \033[31mred\033[m \303\251\n'
		printf 'guest: \033]0;title\007title \033[6nreport \033[cattributes \033P$qm\033\\string \302\2336nc1\n'
	END
	on_terminal "$MACHINE"
	check "nothing came: $(tail_of /tmp/screen)" has 'guest: ' || return
	check "the colour did not come" has 'guest: \033[31mred\033[m \0303\0251' || return
	check "the rest is not what it should be: $(tail_of /tmp/screen)" has 'guest: title report attributes string ?6nc1'
}

test_output_to_a_terminal_is_raw_when_asked() {
	archive console <<-'END'
		printf 'guest: \033]0;title\007title\n'
	END
	on_terminal "$MACHINE --raw-console"
	check "it did not come whole: $(tail_of /tmp/screen)" has 'guest: \033]0;title\007title' || return
	$MACHINE </dev/null >/tmp/screen 2>&1
	check "to a file it did not come whole: $(tail_of /tmp/screen)" has 'guest: \033]0;title\007title'
}

# Firmware writes a line and powers off at once (SLP_TYP 5, SLP_EN).
test_last_words_that_can_not_be_written_fail_the_run() {
	{
		head -c 65520 /dev/zero
		printf '\272\370\003\260\012\356\272\004\006\270\000\064\357\364\000\000'
	} >/tmp/line.rom
	rvisor run --device "$device" --firmware /tmp/line.rom </dev/null >/tmp/line.log 2>&1
	status=$?
	check "with room for it the run ended with $status: $(tail_of /tmp/line.log)" test $status -eq 0 || return
	rvisor run --device "$device" --firmware /tmp/line.rom </dev/null 2>/tmp/line.log >/dev/full
	status=$?
	check "the run ended with $status: $(tail_of /tmp/line.log)" test $status -eq 1 || return
	check "the cause is not named: $(tail_of /tmp/line.log)" grep -q 'writing the console: ' /tmp/line.log
}

run_tests virtio_console output_to_a_terminal_is_filtered output_to_a_terminal_is_raw_when_asked \
	last_words_that_can_not_be_written_fail_the_run
