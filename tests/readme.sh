# SPDX-License-Identifier: GPL-2.0
# README's commands do what it shows.
# shellcheck shell=sh

. /tests/lib/try.sh
/tests/readme /tests/README.md
status=$?
# What a session that failed leaves behind.
killall -9 rvisor 2>/dev/null
umount /sys/fs/cgroup
exit $status
