# SPDX-License-Identifier: GPL-2.0
# What the scripts say where they can't go on: one line that names the cause, a failing exit status, and
# nothing half-made left behind. Run on this machine, as root: sh tests/host/scripts.sh
# shellcheck shell=sh disable=SC2317 # the functions are called by name

here=$(cd "$(dirname "$0")" && pwd -P)
. "$here/../lib/ktap.sh"

scripts=$here/../../scripts
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
RVISOR_CACHE=$work/cache
export RVISOR_CACHE

# refuses TEXT COMMAND...: the command fails with one line of the scripts' that has TEXT in it, and leaves no
# part of a root or kernel.
refuses() {
	text=$1
	shift
	"$@" >"$work/out" 2>&1 </dev/null
	status=$?
	check "it succeeded" test $status -ne 0 || return
	check "not one line: $(cat "$work/out")" test "$(grep -c '^rvisor: ' "$work/out")" -eq 1 || return
	check "no \"$text\" in: $(grep '^rvisor: ' "$work/out")" grep -q "^rvisor: .*$text" "$work/out" || return
	left=$(ls -d "$RVISOR_CACHE"/root-* "$RVISOR_CACHE"/kernel-* 2>/dev/null)
	check "it left $left behind" test -z "$left"
}

# stub NAME COMMANDS: a program of that name, the only one that is found before the real ones.
stub() {
	rm -rf "${work:?}/bin"
	mkdir -p "$work/bin"
	printf '#!/bin/sh\n%s\n' "$2" >"$work/bin/$1"
	chmod 755 "$work/bin/$1"
}
stubbed() { PATH=$work/bin:$PATH "$@"; }

test_not_root() {
	unshare --user true 2>/dev/null || { skip "this kernel allows no user namespaces"; return; }
	refuses "needs root" unshare --user "$scripts/build-root"
}

test_unknown_host() {
	stub uname 'echo Linux aarch64'
	refuses "Linux x86_64 only" stubbed "$scripts/build-root"
}

test_no_network() { refuses "needs the network" unshare --net "$scripts/build-root"; }

test_too_little_disk() {
	mkdir -p "$RVISOR_CACHE"
	# shellcheck disable=SC2016 # for the inner shell
	refuses "free space and 10 GiB are needed" unshare --mount --propagation private \
		sh -c 'mount -t tmpfs -o size=64m tmpfs "$RVISOR_CACHE" && exec "$1"' sh "$scripts/build-root"
}

test_no_place_for_the_cache() {
	refuses "set RVISOR_CACHE" env RVISOR_CACHE=/proc/rvisor "$scripts/build-root"
}

# As Ctrl-C does it: while a step makes something.
test_interrupted() {
	# shellcheck disable=SC2016 # for the stub
	stub debootstrap 'for last; do root=$last; done; mkdir -p "$root/etc"; echo 13 >"$root/etc/debian_version"
echo $$ >'"$work/started"'; sleep 30'
	rm -f "$work/started"
	PATH=$work/bin:$PATH setsid "$scripts/build-root" >"$work/out" 2>&1 </dev/null &
	script=$!
	tries=100
	while [ ! -s "$work/started" ] && [ $tries -gt 0 ]; do
		sleep 0.1
		tries=$((tries - 1))
	done
	kill -TERM -$script
	wait $script
	status=$?
	check "the step never began: $(cat "$work/out")" test -s "$work/started" || return
	check "it ended with status 0" test $status -ne 0 || return
	left=$(ls -d "$RVISOR_CACHE"/root-* 2>/dev/null)
	check "it left $left behind" test -z "$left"
}

# What takes long says what it is, and how long it took; what is quick is silent.
test_progress() {
	cat >"$work/steps" <<-END
		. $scripts/lib.sh
		quiet_step $work/log quick true
		quiet_step $work/log slow sleep 3
	END
	said=$(bash "$work/steps" 2>&1 | tr '\n' ' ')
	# Whole seconds of the clock: three may be over four of its ticks.
	case $said in
	'slow ... slow: 3 s ' | 'slow ... slow: 4 s ') ;;
	*) why "it says: $said"; return 1 ;;
	esac
}

# What a script does at its end, such as removing what is half made, is not done by the process beside its steps that is
# killed.
test_progress_ends_alone() {
	cat >"$work/steps" <<-END
		. $scripts/lib.sh
		trap 'echo "ended"' EXIT
		trap 'exit 130' INT TERM HUP
		for step in $(seq 40 | tr '\n' ' '); do quiet_step $work/log step true; done
	END
	said=$(bash "$work/steps" 2>&1 | tr '\n' ' ')
	check "it says: $said" test "$said" = 'ended '
}

test_module_without_a_tree() {
	refuses "no kernel build tree at $work/nowhere" "$scripts/module" "$work/nowhere"
}

test_module_for_a_kernel_without_rust() {
	mkdir -p "$work/tree"
	touch "$work/tree/Makefile"
	refuses "has no .config" "$scripts/module" "$work/tree" || return
	echo 'CONFIG_MODULES=y' >"$work/tree/.config"
	refuses "without CONFIG_RUST" "$scripts/module" "$work/tree"
}

test_module_for_a_realtime_kernel() {
	mkdir -p "$work/tree"
	touch "$work/tree/Makefile"
	printf 'CONFIG_RUST=y\nCONFIG_PREEMPT_RT=y\n' >"$work/tree/.config"
	refuses "has CONFIG_PREEMPT_RT" "$scripts/module" "$work/tree"
}

test_module_names_all_that_is_missing() {
	mkdir -p "$work/tree/rust" "$work/tree/include/config"
	touch "$work/tree/Makefile" "$work/tree/rust/libcore.rmeta"
	echo 7.3.0-test >"$work/tree/include/config/kernel.release"
	printf 'CONFIG_RUST=y\nCONFIG_RUSTC_VERSION_TEXT="rustc 1.0.0 (of long ago)"\n' >"$work/tree/.config"
	refuses "is not enough to build a Rust module" "$scripts/module" "$work/tree" || return
	for part in rust/libkernel.rmeta Module.symvers 'rustc 1.0.0 (of long ago)'; do
		check "it does not name $part: $(cat "$work/out")" grep -qF "$part" "$work/out" || return
	done
	check_not "it names what is there" grep -q 'rust/libcore.rmeta' "$work/out"
}

# At once: nothing is built before.
test_install_without_a_kernel() {
	refuses "say for which kernel" env -u KDIR -u RVISOR_HOST -u MAKEFLAGS RVISOR_CACHE=/proc/rvisor make -C "$scripts/.." install
}

test_install_where_nothing_can_be_written() {
	touch "$work/file"
	refuses "$work/file is not a folder that this user can write to" env DESTDIR="$work/file" "$scripts/install" --no-module
}

# With a DKMS that fails.
test_package_goes_though_dkms_fails() {
	# shellcheck disable=SC2016 # for the stub
	stub dkms '[ "$1" = status ] && echo there'
	stubbed sh "$here/../../packaging/prerm" upgrade 2 >"$work/out" 2>&1
	status=$?
	check "prerm ended with $status: $(cat "$work/out")" test $status -eq 0 || return
	check "it says: $(cat "$work/out")" grep -q '^rvisor: DKMS did not remove the module' "$work/out"
}

# DKMS takes the kernels whose source the package brings, and no others.
test_package_is_for_kernels_with_source() {
	pattern=$(sed -n 's/^BUILD_EXCLUSIVE_KERNEL="\(.*\)"$/\1/p' "$here/../../packaging/dkms.conf.in")
	sources=$(grep -o 'linux-source-[0-9.]*' "$here/../../packaging/control.in" | sort -u)
	check "the package brings $sources" test "$sources" = linux-source-7.3 || return
	taken=$(printf '%s\n' 6.12.5+deb13-amd64 7.2.9+deb14-amd64 7.3.4+deb13-cloud-amd64 7.3-amd64 7.30.1-amd64 7.4.1+deb14-amd64 |
		grep -E "$pattern" | tr '\n' ' ')
	check "DKMS takes $taken" test "$taken" = '7.3.4+deb13-cloud-amd64 7.3-amd64 '
}

# postinst has DKMS build for each kernel that is there with its headers; where none is the package's it says so.
test_package_is_built_for_kernels() {
	sed "s|/lib/modules|$work/kernels|g; s|/var/lib/dkms|$work/state|g; s|/etc/dkms|$work/etc|g" "$here/../../packaging/postinst" >"$work/postinst"
	# shellcheck disable=SC2016 # for the stub
	stub dkms '[ "$1" != install ] || echo "for $7"'
	mkdir -p "$work/kernels/6.12.5-old/kernel" "$work/kernels/6.12.5-old/build/include" "$work/kernels/7.3.3-gone/build/include"
	stubbed sh "$work/postinst" triggered >"$work/out" 2>&1
	check "it says: $(cat "$work/out")" test "$(cut -d : -f 1 "$work/out" | tr '\n' ' ')" = 'for 6.12.5-old rvisor ' || return
	check "it says: $(cat "$work/out")" grep -q 'when a 7.3 kernel and its linux-headers are installed' "$work/out" || return
	mkdir "$work/kernels/7.3.3-gone/kernel"
	stubbed sh "$work/postinst" triggered >"$work/out" 2>&1
	check "it says: $(cat "$work/out")" test "$(tr '\n' ' ' <"$work/out")" = 'for 6.12.5-old for 7.3.3-gone '
}

# dkms_build [--check] RELEASE: packaging/dkms-build with folders and programs of this test's.
dkms_build() {
	(cd "$work/dkms" && RVISOR_ENVIRONMENT=test RVISOR_HEADERS=$work/linux/headers RVISOR_SOURCES=$work RVISOR_TREES=$work/trees \
		RVISOR_MODULES=$work/modules stubbed sh "$here/../../packaging/dkms-build" "$@") >"$work/out" 2>&1
}

# The tree that DKMS's build makes: anew where it was not finished, the compilers or the headers are others; not where its
# kernel is gone.
test_package_keeps_a_tree() {
	mkdir -p "$work/dkms/packaging" "$work/linux/headers" "$work/trees/7.3.3-gone" "$work/trees/7.3.2-there" "$work/modules/7.3.2-there"
	touch "$work/linux/headers/.config" "$work/linux/headers/Module.symvers"
	tar -C "$work/linux" -cf "$work/linux-source-7.3.tar.xz" headers
	# shellcheck disable=SC2016 # for the stub
	stub make 'case $0 in *make) echo 7.3.4 ;; *dpkg-query) echo "$SOURCE" ;; *) echo "$COMPILER" ;; esac'
	for program in rustc x86_64-linux-gnu-gcc-14 dpkg-query; do
		cp "$work/bin/make" "$work/bin/$program"
	done
	# shellcheck disable=SC2016 # for the stub
	echo 'mkdir "$4" && echo "$COMPILER" >>"$4/../../../made" && [ "$COMPILER" != wrong ]' >"$work/dkms/packaging/module-tree"
	for COMPILER in wrong one one two two; do
		export COMPILER
		dkms_build 7.3.4-test
		status=$?
		if [ "$COMPILER" = wrong ]; then
			check "it succeeded" test $status -ne 0 || return
			check "a part of a tree is left" test ! -e "$work/trees/7.3.4-test" || return
		else
			check "it ended with $status: $(cat "$work/out")" test $status -eq 0 || return
		fi
		# The second "two" is for other headers.
		[ "$COMPILER" != two ] || echo changed >"$work/linux/headers/Module.symvers"
	done
	check "trees made: $(tr '\n' ' ' <"$work/made")" test "$(tr '\n' ' ' <"$work/made")" = 'wrong one two two ' || return
	kept=$(cd "$work/trees" && echo *)
	check "kept: $kept" test "$kept" = '7.3.2-there 7.3.4-test' || return
	tree_or_source || return
	first_release
}

# A kernel without source is passed over, but for one whose tree is there.
tree_or_source() {
	export SOURCE=7.3.5-1~bpo13+1
	dkms_build --check 7.3.4-test
	status=$?
	check "with a tree it ended with $status: $(cat "$work/out")" test $status -eq 0 || return
	rm -r "$work/trees/7.3.4-test"
	dkms_build --check 7.3.4-test
	status=$?
	check "without source it ended with $status: $(cat "$work/out")" test $status -eq 77 || return
	check "it says: $(cat "$work/out")" grep -qx 'rvisor: .* linux-source-7.3 is 7.3.5, not 7.3.4' "$work/out" || return
	SOURCE=7.3.4-1~bpo13+1
	dkms_build --check 7.3.4-test
	status=$?
	check "with source it ended with $status: $(cat "$work/out")" test $status -eq 0
}

# The first of a series has two numbers in its name and in that of Debian's source, and three in that source itself.
first_release() {
	sed -i 's/7\.3\.4/7.3.0/' "$work/bin/make"
	COMPILER=one SOURCE=7.3-1~exp1
	for first in 7.3 7.3.0; do
		for check in --check ''; do
			# shellcheck disable=SC2086 # none is no argument
			dkms_build $check "$first-test"
			status=$?
			check "$check $first-test ended with $status: $(cat "$work/out")" test $status -eq 0 || return
		done
	done
	dkms_build 7.3.1-test
	check "another's source is taken: $(cat "$work/out")" grep -q 'is Linux 7.3.0, not 7.3.1' "$work/out"
}

run_tests not_root unknown_host no_network too_little_disk no_place_for_the_cache interrupted progress progress_ends_alone \
	module_without_a_tree module_for_a_kernel_without_rust module_for_a_realtime_kernel \
	module_names_all_that_is_missing install_without_a_kernel install_where_nothing_can_be_written package_goes_though_dkms_fails \
	package_is_for_kernels_with_source package_is_built_for_kernels package_keeps_a_tree
