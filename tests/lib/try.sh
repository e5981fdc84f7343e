# SPDX-License-Identifier: GPL-2.0
# What README's commands find in the test host: a file of machines, a disk, cgroups.
# shellcheck shell=sh

sed 1d /tests/lib/machines.toml >/root/machines.toml
truncate -s 16M /root/web.img
[ -e /sys/fs/cgroup/cgroup.procs ] || mount -t cgroup2 none /sys/fs/cgroup
