# SPDX-License-Identifier: GPL-2.0
# Guests that run a script of the test's.
# shellcheck shell=sh

# archive NAME [FOLDER]: an initial RAM disk /tmp/NAME.cpio whose guest runs the script on standard input, with what
# is in FOLDER in its root.
archive() {
	rm -rf /tmp/tree
	mkdir /tmp/tree
	[ -z "${2:-}" ] || cp -r "$2/." /tmp/tree || return
	cat >/tmp/tree/guest-script
	(cd /tmp/tree && find . | cpio -o -H newc 2>/dev/null) | cat /guest/initramfs.cpio - >"/tmp/$1.cpio"
}
