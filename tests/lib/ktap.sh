# SPDX-License-Identifier: GPL-2.0
# KTAP for shell tests (busybox sh). A test is a function; "run_tests NAME..." runs the functions test_NAME.
# A function fails with a non-zero status, having said why with "why TEXT"; "skip TEXT" skips it.
# With ONLY in the environment, a program that has tests of these names runs them alone.
# shellcheck shell=sh

why() { WHY=$*; }
skip() { SKIP=$*; }

# check TEXT COMMAND...: the command must succeed, else TEXT is why the test fails.
check() {
	WHY=$1
	shift
	"$@"
}

# check_not TEXT COMMAND...: the command must fail.
check_not() {
	WHY=$1
	shift
	! "$@"
}

# wait_for SECONDS COMMAND...: tries until the command succeeds.
wait_for() {
	tries=$(($1 * 10))
	shift
	while [ "$tries" -gt 0 ]; do
		"$@" && return
		usleep 100000
		tries=$((tries - 1))
	done
	return 1
}

# Messages of level warning and worse, except KVM's own, that the module is not the kernel's, and what a test
# has marked as meant.
kernel_complaints() {
	dmesg -r | sed '/rvisor-test: what follows is meant/,/rvisor-test: what follows is not meant/d' |
		grep '^<[0-4]>' | grep -v -e 'loading out-of-tree module taints kernel' -e '\] kvm'
}

# Prints those of the names that ONLY has; all of them where it has none.
chosen_tests() {
	chosen=''
	for name; do
		case " ${ONLY:-} " in
		*" $name "*) chosen="$chosen $name" ;;
		esac
	done
	echo "${chosen:-$*}"
}

run_tests() {
	# shellcheck disable=SC2046 # words
	set -- $(chosen_tests "$@")
	echo "KTAP version 1"
	echo "1..$#"
	number=0
	for name; do
		number=$((number + 1))
		WHY='' SKIP=''
		if "test_$name"; then
			echo "ok $number $name${SKIP:+ # SKIP $SKIP}"
		else
			echo "not ok $number $name # ${WHY:-failed}"
		fi
	done
}
