# SPDX-License-Identifier: GPL-2.0
# Installs build/rvisor_*.deb with apt in a copy of a fresh Debian (scripts/debian-root) and looks what it did; upgrades,
# removes and purges it again. On the way it packs that Debian, without what only a build needs, into an archive for
# scripts/testhost --system; tests/package.sh goes on there.
# Run on this machine, as root: bash tests/host/package.sh ARCHIVE
# shellcheck shell=bash disable=SC2317 # the functions are called by name

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
. "$here/../../scripts/lib.sh"
. "$here/../lib/ktap.sh"

archive=$1
fresh=$("$RVISOR_SRC/scripts/debian-root")
release=$(cat "$("$RVISOR_SRC/scripts/stock-kernel" --image)/release")
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$RVISOR_SRC/userspace-tool/Cargo.toml" | head -n 1)
deb=$RVISOR_BUILD/rvisor_${version}_amd64.deb
mkdir -p "$RVISOR_BUILD/run"
work=$(mktemp -d "$RVISOR_BUILD/run/$$.XXXXXX")
root=$work/root
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM HUP

# in_debian COMMAND...: there, with what it says in $work/out.
in_debian() { in_root_of "$root" "$@" >"$work/out" 2>&1 </dev/null; }

# gives COMMAND...: it succeeds there.
gives() {
	in_debian "$@" && return
	why "$*: $(tail -n 4 "$work/out" | tr '\n' ' ')"
	return 1
}

# answers TEXT COMMAND...: it succeeds there and says that alone.
answers() {
	local text=$1
	shift
	gives "$@" || return
	check "$*: $(tr '\n' ' ' <"$work/out")" test "$(cat "$work/out")" = "$text"
}

# What is there but for the kernel's file systems, what packages' tools keep for themselves, and logs.
files() {
	(cd "$root" && find . \( -path ./dev -o -path ./proc -o -path ./sys -o -path ./run -o -path ./tmp -o -path ./var/log -o -path ./var/cache/apt \
		-o -path ./var/cache/man -o -path ./var/lib/dpkg -o -path ./var/lib/apt -o -path './var/lib/dkms/mok.*' -o -path './etc/*-' \) \
		-prune -o -print | LC_ALL=C sort)
}

# What apt would do where the package's dependencies are not there yet: all are to be had, and are configured before it.
test_dependencies() {
	local package
	awk 'NR == FNR { wanted["Package: " $0]; next } /^Package: / { kept = $0 in wanted } kept' \
		"$fresh/system" "$root/var/lib/dpkg/status" >"$root/status"
	gives apt-get install --simulate -o Dir::State::status=/status "$deb" || return
	rm "$root/status"
	sed -n '/^Conf rvisor /q; s/^Conf \([^ ]*\) .*/\1/p' "$work/out" >"$work/earlier"
	in_root dpkg-deb -f "$deb" Depends | tr -d ',' | tr ' ' '\n' | grep -vxF -f "$fresh/system" >"$work/needed"
	check "it depends on nothing" test -s "$work/needed" || return
	while read -r package; do
		check "apt does not configure $package before it" grep -qx "$package" "$work/earlier" || return
	done <"$work/needed"
}

# A kernel that the package has no source for, one whose build fails, and one of which there are headers alone; all are
# older than Debian's.
sourceless=7.3.2+deb13-sourceless failing=7.3.3+deb13-failing gone=7.3.1+deb13-gone
make_kernels() {
	local kernel
	for kernel in "$sourceless" "$failing" "$gone"; do
		mkdir -p "$root/usr/lib/modules/$kernel/build"/{include,rust}
		echo CONFIG_RUST=y >"$root/usr/lib/modules/$kernel/build/.config"
	done
	mkdir "$root/usr/lib/modules"/{"$sourceless","$failing"}/kernel
	touch "$root/usr/lib/modules/$failing/build/rust/libkernel.rmeta"
}

# As "apt install ./rvisor.deb": DKMS builds the module for the kernel that is there. All that it needs is there too:
# debian-root goes by the package's own words.
test_install() {
	gives true || return
	make_kernels
	mkdir "$root/wrong"
	printf '#!/bin/sh\nexit 1\n' >"$root/wrong/rustc"
	chmod 755 "$root/wrong/rustc"
	files >"$work/before"
	# As an earlier installation may have left it.
	gives groupadd --system rvisor-machine || return
	# What an administrator may have set for other work does not reach the build. apt has a path of its own for that, but
	# not where it is told of none.
	gives env PATH=/wrong:/usr/sbin:/usr/bin:/sbin:/bin ARCH=arm64 apt-get install -y -o DPkg::Path= "$deb" || return
	cp "$work/out" "$work/install"
	check "$(grep 'newly installed' "$work/out")" grep -q '0 upgraded, 1 newly installed, 0 to remove' "$work/out" || return
	check_not "$(grep -A 5 'was not built' "$work/out" | tr '\n' ' ')" grep -q "was not built.*$release" "$work/out"
}

# A kernel that can't have the module does not keep it from the others, and is told with the reason.
test_other_kernels() {
	check "it says: $(grep 'was not built' "$work/install")" grep -q "^rvisor: the module was not built for $failing; " "$work/install" || return
	check "what has no source is told as a failure" test "$(grep -c 'was not built for' "$work/install")" -eq 1 || return
	check "no reason is told" grep -q "^rvisor: no module for $sourceless: the package linux-source-7.3 is ${release%%+*}, not 7.3.2" "$work/install" || return
	check_not "it tries one that is gone" grep -qF "$gone" "$work/install"
}

test_module_is_built() {
	answers "rvisor/$version, $release, x86_64: installed" dkms status || return
	gives modinfo -k "$release" -F vermagic rvisor || return
	check "it is for $(cat "$work/out")" grep -q "^$release " "$work/out" || return
	gives modinfo -k "$release" -n rvisor || return
	check "it is $(cat "$work/out")" grep -q "^/lib/modules/$release/updates/dkms/rvisor\.ko" "$work/out"
}

# A kernel's module is built when its source comes, though the package was there before.
test_source_comes_later() {
	gives dkms unbuild "rvisor/$version" -k "$release" || return
	gives dpkg-trigger --by-package=linux-source-7.3 /usr/src/linux-source-7.3.tar.xz || return
	gives dpkg --triggers-only rvisor || return
	answers "rvisor/$version, $release, x86_64: installed" dkms status
}

# The tree that the module was built against goes with its kernel, not with an upgrade of that, and not with others.
test_tree_goes_with_its_kernel() {
	local trees=$root/var/cache/rvisor
	check "there is no tree" test -s "$trees/$release/complete" || return
	mkdir "$trees/$failing"
	gives linux-run-hooks image postrm "$failing" "/boot/vmlinuz-$failing" -- upgrade 1 || return
	check "it goes with an upgrade" test -d "$trees/$failing" || return
	gives linux-run-hooks image postrm "$failing" "/boot/vmlinuz-$failing" -- remove || return
	check "it is left" test ! -e "$trees/$failing" || return
	check "another kernel's is gone" test -s "$trees/$release/complete"
}

# What the package's script has made is what systemd would make.
test_accounts() {
	gives getent group rvisor || return
	answers 'rvisor-machine:/:/usr/sbin/nologin' sh -c 'getent passwd rvisor-machine | cut -d : -f 1,6,7' || return
	gives systemd-sysusers --dry-run rvisor.conf || return
	check_not "systemd-sysusers would: $(tr '\n' ' ' <"$work/out")" grep -qi creat "$work/out"
}

# With the manual pages that it names.
test_unit() { gives systemd-analyze verify rvisor@demo.service; }

test_udev_rule() { gives udevadm verify --no-summary /usr/lib/udev/rules.d/60-rvisor.rules; }

# What ages files in /tmp leaves alone those of machines; here ten days are a microsecond.
test_tmpfiles() {
	# shellcheck disable=SC2016 # for the inner shell
	gives sh -ec 'mkdir -p /run/tmpfiles.d /tmp/rvisor-1000/one
		touch /tmp/rvisor-1000/one/sock /tmp/other
		echo "q /tmp 1777 root root 1us" >/run/tmpfiles.d/tmp.conf
		systemd-tmpfiles --clean --prefix=/tmp
		ls /tmp /tmp/rvisor-1000/one; rm -r /run/tmpfiles.d/tmp.conf' || return
	check_not "nothing is aged away" grep -qx other "$work/out" || return
	check "a machine's is gone: $(tr '\n' ' ' <"$work/out")" grep -qx sock "$work/out"
}

test_files_are_the_packages() { answers '' dpkg --verify rvisor; }

# A manual page for each command, without an error of groff's.
test_manual_pages() {
	local page
	gives sh -c "rvisor --help | sed -n '/^Commands:/,/^\$/s/^  \([a-z]*\) .*/rvisor-\1/p'" || return
	check "only $(tr '\n' ' ' <"$work/out")" grep -qx rvisor-up "$work/out" || return
	grep -vx rvisor-help "$work/out" >"$work/pages"
	while read -r page; do
		gives man --warnings -E UTF-8 -P cat "$page" || return
		check_not "$page: $(grep -i warning "$work/out" | head -n 2)" grep -qi 'warning' "$work/out" || return
	done <"$work/pages"
}

# Bash finds what completes the command, and that knows its options; zsh and fish have theirs where they look for them.
test_completions() {
	# shellcheck disable=SC2016 # for the inner shell
	gives bash -c '. /usr/share/bash-completion/bash_completion && _comp_load rvisor && complete -p rvisor &&
		COMP_WORDS=(rvisor run --memory-m) COMP_CWORD=2 && _rvisor rvisor --memory-m run && echo "${COMPREPLY[@]}"' || return
	check "bash: $(tail -n 1 "$work/out")" grep -qx -e '--memory-max' "$work/out" || return
	gives test -s /usr/share/zsh/vendor-completions/_rvisor -a -s /usr/share/fish/vendor_completions.d/rvisor.fish
}

# What the crates that the tool is linked with want said of them.
test_notices() {
	gives zcat /usr/share/doc/rvisor/crates.gz || return
	check "it does not name clap" grep -q '^clap v[0-9.]* MIT OR Apache-2.0$' "$work/out" || return
	check "it has no notice of clap's" grep -q '^==> clap v[0-9.]*: LICENSE-MIT <==$' "$work/out"
}

# README's steps are those that are taken here and in tests/package.sh.
test_steps_of_the_readme() {
	local step
	while read -r step; do
		check "README has no \"$step\"" grep -qxF "    $step" "$RVISOR_SRC/README.md" || return
	done <<-END
		apt install ./build/${deb##*/}
		usermod -aG rvisor USER
		cp /usr/share/doc/rvisor/examples/machines.toml /etc/rvisor/demo.toml
		systemctl start rvisor@demo
	END
}

# The files that the example names are where Debian has them.
test_example() {
	local file
	sed -n 's/^\(kernel\|initrd\|firmware\) = "\(.*\)"$/\2/p' "$root/usr/share/doc/rvisor/examples/machines.toml" >"$work/named"
	check "it names no file" test -s "$work/named" || return
	while read -r file; do
		gives test -e "$file" || return
	done <"$work/named"
}

# An archive for the test host: without the files of packages that only a build needs, and without what only people read.
test_archive() {
	local others
	in_root dpkg-query --admindir "$root/var/lib/dpkg" -W -f '${Package}\n' >"$work/packages" || return
	others=$(grep -vxF -e rvisor -f "$fresh/system" "$work/packages")
	# shellcheck disable=SC2086 # names
	in_root dpkg-query --admindir "$root/var/lib/dpkg" -L $others | sed -n 's|^/|./|p' >"$work/dropped" || return
	# Folders are in the list too, where others have files.
	(cd "$root" && find . \( -path ./boot -o -path ./usr/src -o -path ./usr/share/locale -o -path ./usr/share/i18n \
		-o -path './usr/lib/*/gconv' -o -path './var/cache/*' -o -path ./var/lib/apt/lists -o -path ./var/lib/dkms \
		-o -path ./usr/sbin/policy-rc.d \) -prune -o \( -path './usr/share/doc/*' -o -path './usr/share/man/*' \) ! -type d \
		! -path '*rvisor*' -o -type d -printf '%p/\n' -o -print) | grep -vxF -f "$work/dropped" | sed 's|/$||' >"$work/kept"
	# shellcheck disable=SC2016 # for the inner shell
	in_root sh -ec 'cd "$1"; cpio --quiet -H newc -o >"$2"' sh "$root" "$archive" <"$work/kept" 2>"$work/out"
	check "$(tail -n 2 "$work/out")" test -s "$archive"
}

# The same package with a higher version.
newer_package() {
	local tree=$work/newer
	in_root dpkg-deb -R "$deb" "$tree"
	mv "$tree/usr/src/rvisor-$version" "$tree/usr/src/rvisor-$version.1"
	sed -i "/^[Vv]ersion[:=]/s/$version/$version.1/" "$tree"/DEBIAN/{control,postinst,prerm}
	sed -i "/^PACKAGE_VERSION=/s/$version/$version.1/" "$tree/usr/src/rvisor-$version.1/dkms.conf"
	rm "$tree/DEBIAN/md5sums"
	in_root dpkg-deb --root-owner-group -Znone --build "$tree" "$root/newer.deb"
}

# An upgrade that fails leaves the older one's module.
test_failed_upgrade() {
	newer_package >"$work/out" 2>&1 || { why "$(tail -n 2 "$work/out")"; return 1; }
	printf '#!/bin/sh\nexit 1\n' >"$work/newer/DEBIAN/preinst"
	chmod 755 "$work/newer/DEBIAN/preinst"
	in_root dpkg-deb --root-owner-group -Znone --build "$work/newer" "$root/failing.deb" >"$work/out" 2>&1 ||
		{ why "$(tail -n 2 "$work/out")"; return 1; }
	check_not "it succeeded" in_debian dpkg --install /failing.deb || return
	rm "$root/failing.deb"
	answers "rvisor/$version, $release, x86_64: installed" dkms status
}

# The newer one's module takes the older one's place.
test_upgrade() {
	gives apt-get install -y /newer.deb || return
	rm "$root/newer.deb"
	answers "rvisor/$version.1, $release, x86_64: installed" dkms status || return
	check "its source is still there" test ! -e "$root/usr/src/rvisor-$version"
}

test_remove() {
	local left
	gives systemctl enable rvisor@demo || return
	gives apt-get remove -y rvisor || return
	answers '' dkms status || return
	left=$(cd "$root" && find lib/modules var/lib/dkms -name '*rvisor*') || { why "find: $?"; return 1; }
	check "left: $left" test -z "$left" || return
	check "trees are left" test ! -e "$root/var/cache/rvisor" || return
	check "the tool is still there" test ! -e "$root/usr/bin/rvisor"
}

# Nothing is left but, as Debian does it, the accounts, so that no other gets what belonged to them.
test_purge() {
	gives apt-get purge -y rvisor || return
	files | comm -13 "$work/before" - >"$work/left"
	check "left: $(head -n 5 "$work/left" | tr '\n' ' ')" test ! -s "$work/left"
}

# files_below FOLDER: what is there but the module's source and what the package alone has.
files_below() {
	(cd "$1" && find . -type f ! -path './src/*' ! -path './share/kernel/*' ! -path './share/lintian/*' ! -path ./share/doc/rvisor/README.md \
		! -path ./share/doc/rvisor/copyright ! -path ./share/doc/rvisor/c\*.gz | LC_ALL=C sort)
}

# "make install" installs the same, and the module itself, for all users to read, whatever root's umask. zsh has another
# folder below /usr/local.
test_make_install() {
	local unit=lib/systemd/system/rvisor@.service secret
	(cd "$work" && umask 077 && DESTDIR=made PREFIX=/usr/local "$RVISOR_SRC/scripts/install" stock >"$work/out" 2>&1) ||
		{ why "$(tail -n 2 "$work/out")"; return 1; }
	in_root dpkg-deb -x "$deb" "$work/package"
	files_below "$work/package/usr" | sed 's|zsh/vendor-completions|zsh/site-functions|' >"$work/of-package"
	files_below "$work/made/usr/local" | LC_ALL=C sort | diff "$work/of-package" - >"$work/out"
	check "$(grep '^[<>]' "$work/out" | head -n 3 | tr '\n' ' ')" test ! -s "$work/out" || return
	secret=$(find "$work/made" ! -perm -o=r | head -n 3 | tr '\n' ' ')
	check "not for all: $secret" test -z "$secret" || return
	check "the unit names another tool" grep -q '^ExecStart=/usr/local/bin/rvisor ' "$work/made/usr/local/$unit" || return
	check "no module" cmp "$RVISOR_BUILD/$release/rvisor.ko" "$work/made/lib/modules/$release/extra/rvisor.ko"
}

cp -a "$fresh/root" "$root"
rm -f "$archive"
run_tests dependencies install module_is_built other_kernels source_comes_later tree_goes_with_its_kernel \
	accounts unit udev_rule tmpfiles files_are_the_packages manual_pages completions notices steps_of_the_readme example archive \
	failed_upgrade upgrade remove purge make_install
