# SPDX-License-Identifier: GPL-2.0
# Debian as it starts with the package installed: the module is there without a word, members of the group run guests,
# others do not, and systemd runs the machines of a file. /guest has the small Linux guest.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

# as USER COMMAND: a command of the user's shell, its output in /tmp/out.
as() { su - "$1" -c "$2" </dev/null >/tmp/out 2>&1; }
told() { tail -n 3 /tmp/out | tr -d '\r' | tr '\n' ' '; }

# lists USER: rvisor ps as that user, its table in /tmp/out.
lists() { as "$1" 'rvisor ps' || { why "rvisor ps ended with $?: $(told)"; return 1; }; }

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

test_debian() {
	check "this is $(uname -r)" grep -q '(debian-kernel@lists.debian.org)' /proc/version || return
	check "process 1 is $(cat /proc/1/comm)" grep -qx systemd /proc/1/comm || return
	state=$(systemctl is-system-running --wait)
	check "$state: $(systemctl --failed --plain --no-legend | tr '\n' ' ')" test "$state" = running
}

# DKMS's, loaded at the start by the unit that the package names.
test_module_is_loaded() {
	check "it is not loaded" test -d /sys/module/rvisor || return
	file=$(modinfo -n rvisor)
	case $file in
	"/lib/modules/$(uname -r)/updates/dkms/rvisor.ko"*) ;;
	*) why "modprobe takes $file"; return 1 ;;
	esac
	check "there are more" test "$(find /usr /var -name 'rvisor.ko*' | wc -l)" -eq 1 || return
	check "modprobe@rvisor has not run" test "$(systemctl show -P ExecMainExitTimestampMonotonic modprobe@rvisor)" -gt 0
}

node() { stat -c '%U:%G %a' /dev/rvisor; }
test_node() { check "it is $(node)" test "$(node)" = 'root:rvisor 660'; }

# A module that refuses, as it does without VMX, leaves a system that has not failed.
test_refusal_is_no_failure() {
	modprobe -r rvisor || { why "it does not unload"; return 1; }
	mkdir -p /run/modprobe.d
	echo 'install rvisor /bin/false' >/run/modprobe.d/refusal.conf
	systemctl start modprobe@rvisor
	rm /run/modprobe.d/refusal.conf
	check "it is loaded" test ! -e /sys/module/rvisor || return
	state=$(systemctl is-system-running)
	systemctl start modprobe@rvisor
	check "$state" test "$state" = running || return
	check "it is not loaded" test -e /sys/module/rvisor
}

# Loaded anew it is the same.
test_load_again() {
	modprobe -r rvisor || { why "it does not unload"; return 1; }
	check "its node stays" test ! -e /dev/rvisor || return
	modprobe rvisor || { why "it does not load"; return 1; }
	udevadm settle
	test_node
}

test_member_runs_a_machine() {
	useradd -m member && usermod -aG rvisor member || return
	as member 'rvisor run --kernel /guest/bzImage --initrd /guest/initramfs.cpio --memory 64M --cmdline quiet'
	got=$?
	check "rvisor run ended with $got: $(told)" test $got -eq 0 || return
	check "it says: $(told)" grep -q 'guest: end by poweroff' /tmp/out
}

test_others_do_not() {
	useradd -m other || return
	as other 'rvisor run --kernel /guest/bzImage --initrd /guest/initramfs.cpio --memory 64M'
	got=$?
	check "rvisor run ended with $got: $(told)" test $got -eq 2 || return
	check "not one line: $(told)" test "$(wc -l </tmp/out)" -eq 1 || return
	check "it says: $(told)" grep -q '^rvisor: /dev/rvisor may not be opened by this user; .*a member of the group' /tmp/out
}

# Detached, under a name, as a user without a session of systemd's does it.
test_members_machines_have_names() {
	as member 'rvisor run --name mine --detach --kernel /guest/bzImage --initrd /guest/initramfs.cpio --memory 64M \
		--cmdline "quiet guest.end=wait"' || { why "rvisor run --detach: $(told)"; return 1; }
	lists member || return
	check "ps says: $(told)" grep -q '^mine .* running' /tmp/out || return
	lists other || return
	check_not "another user sees it: $(told)" grep -q '^mine ' /tmp/out || return
	as member 'rvisor kill mine' || { why "rvisor kill: $(told)"; return 1; }
	lists member || return
	check_not "it still runs: $(told)" grep -q '^mine ' /tmp/out
}

unit_is() { systemctl show -P "$1" rvisor@demo; }
of_process() { sed -n "s/^$1:[[:space:]]*\([0-9]*\).*/\1/p" "/proc/$2/status"; }

# systemctl start runs the machines of the package's example, in the unit's cgroup and as the user of root's machines.
test_service_starts() {
	cp /usr/share/doc/rvisor/examples/machines.toml /etc/rvisor/demo.toml || { why "there is no example"; return 1; }
	# This host has none of what Debian has in /boot.
	ln -sfn /guest/bzImage /vmlinuz
	ln -sfn /guest/initramfs.cpio /initrd.img
	systemctl start rvisor@demo || { why "systemctl start: $(journalctl -b -o cat -u rvisor@demo | tail -n 3 | tr '\n' ' ')"; return 1; }
	runs() { test "$(rvisor ps 2>&1 | grep -c '^\(web\|db\) .* running')" -eq 2; }
	check "$(rvisor ps 2>&1 | tr '\n' ' ') $(journalctl -b -o cat -u rvisor@demo | tail -n 3 | tr '\n' ' ')" patiently 60 runs || return
	process=$(rvisor ps | sed -n 's/^web *\([0-9]*\) .*/\1/p')
	check "its user is $(of_process Uid "$process")" test "$(of_process Uid "$process")" = "$(id -u rvisor-machine)" || return
	check "its cgroup is $(cat "/proc/$process/cgroup")" grep -q '^0::/system\.slice/.*rvisor@demo\.service/' "/proc/$process/cgroup"
}

# What the guest says is in the journal.
test_service_logs() {
	says() { journalctl -b -o cat -u rvisor@demo | grep -q '^web *| .*Run /bin/sh as init process'; }
	check "the journal has: $(journalctl -b -o cat -u rvisor@demo | tail -n 3 | tr '\n' ' ')" patiently 60 says
}

# systemctl stop ends it, though its guest does not heed the power button, and the unit has not failed.
test_service_stops() {
	check "the unit is $(unit_is ActiveState)" test "$(unit_is ActiveState)" = active || return
	systemctl stop rvisor@demo
	check "the unit is $(unit_is ActiveState), $(unit_is Result)" test "$(unit_is ActiveState) $(unit_is Result)" = 'inactive success' || return
	rvisor ps >/tmp/out 2>&1 || { why "rvisor ps ended with $?: $(told)"; return 1; }
	check_not "they still run: $(told)" grep -q '^\(web\|db\) ' /tmp/out || return
	check "its cgroup is left" sh -c '! find /sys/fs/cgroup/system.slice -name "rvisor@*" | grep .'
}

# A mistake in the file is told in the journal, by line and column.
test_service_tells_mistakes() {
	printf '[machine.one]\nkernel = "/guest/bzImage"\ncmd = "quiet"\n' >/etc/rvisor/wrong.toml
	systemctl start rvisor@wrong
	failed() { systemctl -q is-failed rvisor@wrong; }
	check "the unit is $(systemctl show -P ActiveState rvisor@wrong)" patiently 20 failed || return
	said=$(journalctl -b -o cat -u rvisor@wrong | grep '^rvisor: ')
	check "it says: $said" test "$said" = "rvisor: /etc/rvisor/wrong.toml:3:1: there is no option 'cmd'; 'rvisor run --help' lists the options"
}

# A name without a file is told by systemctl itself.
test_service_without_a_file() {
	if systemctl start rvisor@nowhere >/tmp/out 2>&1; then
		why "it says that it starts"
		return 1
	fi
	check "it says: $(told)" grep -q 'Assertion failed on job for rvisor@nowhere' /tmp/out
}

# Removing the package ends the services' machines first. A unit of the user's own says how long they may take.
test_removal() {
	mkdir /etc/systemd/system/rvisor@demo.service.d
	printf '[Service]\nExecStart=\nExecStart=/usr/bin/rvisor up /etc/rvisor/%%i.toml --timeout 1\n' \
		>/etc/systemd/system/rvisor@demo.service.d/quick.conf
	systemctl daemon-reload
	systemctl start rvisor@demo || { why "systemctl start: $?"; return 1; }
	check "it does not run: $(rvisor ps)" patiently 60 runs || return
	dpkg --remove rvisor >/tmp/out 2>&1 || { why "dpkg: $(told)"; return 1; }
	check "the unit is $(unit_is ActiveState)" test "$(unit_is ActiveState)" = inactive || return
	check "it still runs" sh -c "! grep -qx rvisor /proc/[0-9]*/comm" || return
	check "the module is still loaded" test ! -e /sys/module/rvisor || return
	check "its unit is left: $(unit_is FragmentPath)" test -z "$(unit_is FragmentPath)"
}

# Of the kernel's, the module's: the machine is another than those that Debian's kernel is made for.
test_no_complaints() {
	complaints=$(kernel_complaints | grep rvisor | grep -v "unknown parameter 'host'")
	check "$complaints" test -z "$complaints"
}

run_tests debian module_is_loaded node refusal_is_no_failure load_again member_runs_a_machine others_do_not members_machines_have_names \
	service_starts service_logs service_stops service_tells_mistakes service_without_a_file removal no_complaints
