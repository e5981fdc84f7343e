# SPDX-License-Identifier: GPL-2.0
# Builds, tests and shows rvisor. Everything slow to make is kept in $RVISOR_CACHE (~/.cache/rvisor).

# HOST=debian: Debian's stock kernel in the test host; HOST=checked: one that checks locks and memory. From the
# command line alone: shells export a HOST too.
RVISOR_HOST := $(if $(filter command,$(origin HOST)),$(HOST))
KDIR ?= $(if $(filter debian,$(RVISOR_HOST)),stock,$(filter checked,$(RVISOR_HOST)))
PREFIX ?= /usr/local
CASES ?= 10000000
SEED ?=
INSTALL_MOD_PATH ?=
DESTDIR ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

.PHONY: help module tool programs check fuzz test test-events test-guests test-models test-leaks test-mitigations \
	test-qemu test-kvm-selftests test-systems test-package demo shell bench wakeups install deb clean distclean

help: ## this text
	@echo 'make demo                load rvisor.ko in a machine with VMX and boot a Linux guest there, on this screen'
	@echo 'make test                all checks and tests, those inside the test host too'
	@echo '  HOST=debian            each with Debian'\''s stock kernel in that machine; so with demo, shell and bench'
	@echo '  HOST=checked           with a kernel that checks locks, sleeping and memory'
	@echo 'make test-events         CPU hot-unplug and suspend of the host while guests run'
	@echo 'make test-models         a guest on each CPU model that Bochs has'
	@echo 'make test-guests         guests that others have made: stock kernels of 64 and 32 bits, memtest86+ (minutes)'
	@echo 'make test-systems        Debian on a disk, by GRUB too, 32-bit Linux, memtest86+, all at once (minutes)'
	@echo 'make test-package        the package, installed in a fresh Debian that is the host then (minutes)'
	@echo 'make test-leaks          10,000 machines and 100,000 runs leave nothing behind'
	@echo 'make test-mitigations    speculation control, on the small kernel and on that of Debian'
	@echo 'make test-qemu           Debian'\''s own QEMU boots Linux on rvisor'
	@echo 'make test-kvm-selftests  those of the kernel'\''s own tests of KVM that pass on rvisor'
	@echo
	@echo 'make module              build/rvisor.ko for the test host'
	@echo '  KDIR=stock             for Debian'\''s stock 7.3 kernel: build/RELEASE/rvisor.ko, ready for insmod'
	@echo '  KDIR=DIR               for the kernel with the build tree DIR, such as /lib/modules/$$(uname -r)/build'
	@echo 'make tool                build/rvisor, the program that runs guests'
	@echo 'make programs            build/tests, the test programs'
	@echo 'make check               format, lints, the tests that need no test host'
	@echo 'make fuzz                the instruction emulator against iced-x86 and this CPU, at length'
	@echo '  CASES=N                so many cases of each kind (10000000); SEED=N where they begin'
	@echo 'make shell               a shell in the test host, with the module loaded'
	@echo 'make bench               compare with KVM, in instructions'
	@echo 'make wakeups             wake halted guests millions of times (half an hour)'
	@echo 'make install             module (KDIR=DIR, INSTALL_MOD_PATH=DIR) and tool (PREFIX=DIR, DESTDIR=DIR)'
	@echo 'make deb                 a Debian package: the tool, and the module to be built by DKMS'
	@echo 'make clean               remove build/'
	@echo 'make distclean           remove build/ and the cache (build root, kernel)'

module:
	@scripts/module $(if $(KDIR),"$(KDIR)")

tool:
	@scripts/programs tool

programs:
	@scripts/programs tests

check:
	@scripts/check

fuzz:
	@scripts/fuzz

test:
	@scripts/test

test-guests:
	@scripts/test --no-check guests

test-models:
	@scripts/test --no-check models

test-events:
	@scripts/test --no-check all-events

test-leaks:
	@scripts/test --no-check leaks

test-mitigations:
	@scripts/test --no-check mitigations stock-mitigations

test-qemu:
	@scripts/test --no-check qemu

test-systems:
	@scripts/test --no-check systems

test-package:
	@scripts/test --no-check package

test-kvm-selftests:
	@scripts/test --no-check kvm-selftests

demo: module tool
	@scripts/demo

shell: module tool programs
	@scripts/shell

bench: module tool programs
	@scripts/bench

wakeups: module programs
	@scripts/wakeups

# Without KDIR it only says that it wants one.
install: $(if $(KDIR),module tool)
	@scripts/install $(if $(KDIR),"$(KDIR)")

deb: tool
	@scripts/deb

clean:
	@scripts/clean

distclean:
	@scripts/clean --all

export PREFIX INSTALL_MOD_PATH DESTDIR DEVICE RVISOR_HOST CASES SEED
