# SPDX-License-Identifier: GPL-2.0
# Sourced by the scripts that need a kernel or its source: which kernel source of Debian's, and how to get it.
# shellcheck shell=bash

# The pinned source. Where backports has moved on, the newest 7.x there is taken.
PIN_PACKAGE=linux-source-7.3
PIN_VERSION=7.3.4-1~bpo13+1

# Prints "PACKAGE VERSION" for each version of each package whose name begins with PREFIX.
offered_packages() {
	local names
	names=$(in_root apt-cache pkgnames "$1")
	# shellcheck disable=SC2086 # names without blanks
	[ -z "$names" ] || in_root apt-cache madison $names | awk '{ print $1, $3 }'
}

# Asks the mirror what it has today: a list from when the root was made may name what is gone.
refresh_packages() {
	with_lock packages step "$RVISOR_CACHE/log/package-lists" "looking what Debian's backports have" in_root apt-get update
}

# source_path PACKAGE VERSION: where that source is, or will be.
source_path() { printf '%s/%s-%s\n' "$RVISOR_CACHE" "$1" "$2"; }

# Prints "PACKAGE VERSION" of the source to take: the pinned one or the newest 7.x that backports offers.
choose_source() {
	local offered newest
	if [ -e "$(source_path "$PIN_PACKAGE" "$PIN_VERSION")/Makefile" ]; then
		printf '%s %s\n' "$PIN_PACKAGE" "$PIN_VERSION"
		return
	fi
	refresh_packages
	offered=$(offered_packages linux-source-7.)
	if printf '%s\n' "$offered" | grep -qxF "$PIN_PACKAGE $PIN_VERSION"; then
		printf '%s %s\n' "$PIN_PACKAGE" "$PIN_VERSION"
		return
	fi
	newest=$(printf '%s\n' "$offered" | sort -t ' ' -k 2 -V | tail -n 1)
	[ -n "$newest" ] || die "no linux-source-7.x in Debian's backports: is the network there?"
	say "$PIN_PACKAGE $PIN_VERSION is gone from backports; building with ${newest/ / }"
	printf '%s\n' "$newest"
}

# fetch_source PACKAGE VERSION DIRECTORY
fetch_source() {
	# Not local: the trap runs when the function is over.
	tmp=$3.partial
	trap 'rm -rf "$tmp"' EXIT
	rm -rf "$tmp"
	mkdir -p "$tmp/package" "$tmp/source"
	cd "$tmp"
	in_root sh -ec 'cd package; apt-get download "$1=$2"; dpkg-deb --extract ./*.deb .
		tar --strip-components=1 -C ../source -xf usr/src/linux-source-*.tar.xz' sh "$1" "$2"
	mv source "$3"
	rm -rf "$tmp"
}

# need_source PACKAGE VERSION: fetches the source where it is not there yet. Both kernels are made from it.
need_source() { with_lock source unpack_source "$1" "$2" "$(source_path "$1" "$2")"; }

unpack_source() {
	[ -e "$3/Makefile" ] || step "$RVISOR_CACHE/log/kernel-source" "fetching $1" fetch_source "$1" "$2" "$3"
}
