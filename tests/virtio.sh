# SPDX-License-Identifier: GPL-2.0
# Linux as a guest uses its disks, its entropy device and its balloon.
# shellcheck shell=sh disable=SC2317 # the functions are called by name

. /tests/lib/ktap.sh

device=/dev/rvisor
[ "${1:-}" = --device ] && device=$2
WORK=/tmp/virtio-test
LOG=$WORK/log
mkdir -p $WORK

# guest COMMANDS OPTIONS...: boots the small guest, which runs these commands of a shell and powers off. Its
# console goes to $LOG.
guest() {
	mkdir -p $WORK/root
	cat >$WORK/root/init <<END
#!/bin/sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
$1
poweroff -f
END
	shift
	chmod 755 $WORK/root/init
	(cd $WORK/root && echo init | cpio -o -H newc 2>/dev/null) >$WORK/init.cpio
	cat /guest/initramfs.cpio $WORK/init.cpio >$WORK/initramfs.cpio
	timeout 100 rvisor run --device "$device" --kernel /guest/bzImage --initrd $WORK/initramfs.cpio \
		--cmdline "loglevel=4" "$@" </dev/null >$LOG 2>&1
	got=$?
	check "rvisor run ended with $got: $(tail -n 3 $LOG | tr '\n' ' ')" test $got -eq 0
}

# said TEXT: the guest, or the tool, has said so.
said() { check "no '$1': $(tail -n 5 $LOG | tr '\r\n' '  ')" grep -q "$1" $LOG; }

# raw NAME MIB: a file of so many MiB of zeroes.
raw() {
	rm -f "$WORK/$1"
	truncate -s "$2"M "$WORK/$1"
}

# 1 MiB that no two places have alike, and what they look like.
pattern() { seq 1 200000 | head -c 1048576; }
SUM=$(pattern | md5sum | cut -c 1-32)

# Written in the first run, and read from the disk's file by the host and by the guest in the second.
test_raw_disk() {
	raw disk 8
	guest "seq 1 200000 | head -c 1048576 | dd of=/dev/vda bs=64k seek=16 conv=fsync 2>/dev/null
		echo size \$(cat /sys/block/vda/size) ro \$(cat /sys/block/vda/ro) \$(cat /sys/block/vda/queue/write_cache)" \
		--disk $WORK/disk || return
	said 'size 16384 ro 0 write back' || return
	sum=$(dd if=$WORK/disk bs=64k skip=16 count=16 2>/dev/null | md5sum | cut -c 1-32)
	check "the file has $sum, not $SUM" test "$sum" = "$SUM" || return
	guest 'echo sum $(dd if=/dev/vda bs=64k skip=16 count=16 iflag=direct 2>/dev/null | md5sum)' --disk $WORK/disk || return
	said "sum $SUM"
}

# put OFFSET FORMAT: bytes, as printf has them, into the image.
put() {
	# shellcheck disable=SC2059 # the format is the bytes
	printf "$2" | dd of=$WORK/image bs=1 seek="$1" conv=notrunc 2>/dev/null
}

# An empty qcow2 image of 8 MiB: header, refcount table, refcount block and L1 table, a cluster of 64 KiB each.
empty_qcow2() {
	rm -f $WORK/image
	truncate -s 256K $WORK/image
	put 0 'QFI\373\0\0\0\3'
	put 23 '\20'           # log2 of a cluster's size
	put 29 '\200'          # 8 MiB
	put 39 '\1'            # entries of the L1 table, and where it lies
	put 45 '\3'
	put 53 '\1'            # where the refcount table lies, and its clusters
	put 59 '\1'
	put 99 '\4'            # refcounts of 16 bits
	put 103 '\150'         # length of the header
	put 65541 '\2'         # the refcount block, and the four clusters in it
	put 131072 '\0\1\0\1\0\1\0\1'
}

test_qcow2_disk() {
	empty_qcow2
	guest "seq 1 200000 | head -c 1048576 | dd of=/dev/vda bs=64k seek=16 conv=fsync 2>/dev/null" --disk $WORK/image || return
	guest 'echo sum $(dd if=/dev/vda bs=64k skip=16 count=16 2>/dev/null | md5sum)
		echo zeroes $(head -c 65536 /dev/vda | tr -d "\000" | wc -c)' --disk $WORK/image,format=qcow2 || return
	said "sum $SUM" || return
	said 'zeroes 0'
}

test_readonly_disk() {
	raw disk 1
	guest 'echo ro $(cat /sys/block/vda/ro); echo x >/dev/vda || echo refused' --disk $WORK/disk,readonly || return
	said 'ro 1' || return
	said 'refused' || return
	check_not "the file was written to" grep -q x $WORK/disk
}

test_discard_gives_room_back() {
	dd if=/dev/urandom of=$WORK/disk bs=1M count=8 2>/dev/null
	before=$(du -k $WORK/disk | cut -f 1)
	guest 'blkdiscard -o 1048576 -l 4194304 /dev/vda && echo discarded' --disk $WORK/disk || return
	said discarded || return
	after=$(du -k $WORK/disk | cut -f 1)
	check "$before KiB are $after after 4 MiB were discarded" test "$after" -le $((before - 4000))
}

# What the guest has written takes room before, and none behind.
test_discard_gives_room_back_with_qcow2() {
	empty_qcow2
	guest 'dd if=/dev/urandom of=/dev/vda bs=64k count=64 conv=fsync 2>/dev/null; sync; echo written; sleep 4
		blkdiscard -l 4194304 /dev/vda && echo discarded' --disk $WORK/image &
	runner=$!
	wait_for 60 grep -q written $LOG
	before=$(du -k $WORK/image | cut -f 1)
	wait $runner || return
	said discarded || return
	after=$(du -k $WORK/image | cut -f 1)
	check "$before KiB are $after after 4 MiB were discarded" test "$after" -le $((before - 4000))
}

test_several_disks_keep_their_names() {
	for disk in 1 2 3; do
		raw disk$disk $disk
		echo "this is $disk" | dd of=$WORK/disk$disk conv=notrunc 2>/dev/null
	done
	guest 'for disk in /dev/vd?; do
			name=${disk#/dev/}
			echo "$name: $(head -n 1 $disk), $(cat /sys/block/$name/size), $(cat /sys/block/$name/serial)"
		done' --disk $WORK/disk1,serial=first --disk $WORK/disk2,readonly --disk $WORK/disk3,serial=third || return
	said 'vda: this is 1, 2048, first' || return
	said 'vdb: this is 2, 4096, ' || return
	said 'vdc: this is 3, 6144, third'
}

test_a_disk_in_use_is_refused() {
	raw disk 1
	rvisor run --device "$device" --kernel /guest/bzImage --initrd /guest/initramfs.cpio --cmdline guest.end=wait \
		--disk $WORK/disk </dev/null >$LOG-first 2>&1 &
	first=$!
	wait_for 60 grep -q 'guest: end by wait' $LOG-first
	rvisor run --device "$device" --kernel /guest/bzImage --disk $WORK/disk </dev/null >$LOG 2>&1
	got=$?
	kill $first
	wait $first
	check "the exit status is $got" test $got -eq 2 || return
	said 'in use by another guest'
}

# full COMMAND...: the guest writes to the disk that COMMAND makes, with its name behind, on a file system without
# the room. The machine is paused until there is room; nothing of what the guest wrote is lost.
full() {
	mkdir -p $WORK/small
	mount -t tmpfs -o size=512K tmpfs $WORK/small || return
	"$@" $WORK/small/disk || return
	(
		wait_for 60 grep -q 'no room' $LOG
		sleep 1
		grep -c written $LOG >$WORK/while-full
		mount -o remount,size=8M $WORK/small
		rvisor resume full
	) &
	guest 'seq 1 200000 | head -c 1048576 | dd of=/dev/vda bs=64k conv=fsync 2>/dev/null && echo written' \
		--name full --disk $WORK/small/disk
	result=$?
	wait $!
	cp $WORK/small/disk $WORK/disk
	umount $WORK/small
	[ $result -eq 0 ] || return
	said 'no room' || return
	said written || return
	check "the guest went on" grep -q '^0' $WORK/while-full || return
	guest 'echo sum $(dd if=/dev/vda bs=64k count=16 2>/dev/null | md5sum)' --disk $WORK/disk || return
	said "sum $SUM"
}

test_a_full_disk_waits() {
	full truncate -s 2M
}

test_a_full_disk_waits_with_qcow2() {
	empty_qcow2
	full cp $WORK/image
}

# counted FILE NAME: that counter of the only disk, by the last line of --metrics.
counted() { tail -n 1 "$1" | sed -n "s/.*\"$2\":\([0-9]*\).*/\1/p"; }

# What the guest has read and written is told while it runs and at its end.
test_disk_counters() {
	raw disk 8
	guest 'dd if=/dev/zero of=/dev/vda bs=64k count=16 oflag=direct conv=fsync 2>/dev/null
		dd if=/dev/vda of=/dev/null bs=64k count=32 iflag=direct 2>/dev/null; echo disk-done; sleep 4' \
		--name counted --metrics $WORK/metrics --disk $WORK/disk &
	runner=$!
	check "the guest says nothing" wait_for 60 grep -q disk-done $LOG || return
	rvisor stat counted >$WORK/stat
	got=$?
	wait $runner || return
	check "rvisor stat ended with $got" test $got -eq 0 || return
	check "no written_bytes in: $(tr '\n' ' ' <$WORK/stat)" grep -Eq '^ +written_bytes +1048576$' $WORK/stat || return
	for least in read_bytes:2097152 written_bytes:1048576 requests:48 flushes:1; do
		count=$(counted $WORK/metrics "${least%:*}")
		check "${least%:*} is ${count:-not told}, less than ${least#*:}" test "${count:-0}" -ge "${least#*:}" || return
	done
}

test_random_bytes() {
	guest 'echo device $(cat /sys/class/misc/hw_random/rng_current)
		echo bytes $(head -c 1000 /dev/hwrng | tr -d "\000" | wc -c)' || return
	said 'device virtio_rng.0' || return
	count=$(sed -n 's/.*bytes \([0-9]*\).*/\1/p' $LOG)
	check "of 1000 bytes ${count:-none} are not 0" test "${count:-0}" -gt 950
}

test_balloon_takes_memory() {
	guest 'sleep 1; grep MemFree /proc/meminfo' --memory 128M --balloon 64M || return
	kib=$(sed -n 's/.*MemFree: *\([0-9]*\) kB.*/\1/p' $LOG)
	check "the guest has ${kib:-no} KiB" test "${kib:-0}" -gt 20000 -a "${kib:-0}" -lt 60000
}

# KiB of memory that the tool has.
resident() { sed -n 's/^VmRSS:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/$(pidof rvisor)/status"; }
less_than() { test "$(resident)" -lt "$1"; }

# What the guest has used and freed goes back to the host.
test_free_memory_goes_back() {
	guest 'dd if=/dev/zero of=/tmp/file bs=1M count=100 2>/dev/null; rm /tmp/file; echo freed; sleep 12' --memory 256M &
	runner=$!
	check "the guest says nothing" wait_for 60 grep -q freed $LOG || return
	before=$(resident)
	wait_for 8 less_than $((before - 40000))
	result=$?
	after=$(resident)
	wait $runner
	check "$before KiB were $after 8 seconds after 100 MiB were freed" test $result -eq 0
}

run_tests raw_disk qcow2_disk readonly_disk discard_gives_room_back discard_gives_room_back_with_qcow2 several_disks_keep_their_names \
	a_disk_in_use_is_refused a_full_disk_waits a_full_disk_waits_with_qcow2 disk_counters random_bytes balloon_takes_memory free_memory_goes_back
