# SPDX-License-Identifier: GPL-2.0
# Guests that run a script of the test's.
# shellcheck shell=sh

# archive NAME: an initial RAM disk /tmp/NAME.cpio whose guest runs the script on standard input.
archive() {
	rm -rf /tmp/tree
	mkdir /tmp/tree
	cat >/tmp/tree/guest-script
	(cd /tmp/tree && echo guest-script | cpio -o -H newc 2>/dev/null) | cat /guest/initramfs.cpio - >"/tmp/$1.cpio"
}
