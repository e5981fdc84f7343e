/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/* What /dev/rvisor offers beyond KVM's API. The numbers are outside KVM's. */
#ifndef _UAPI_RVISOR_H
#define _UAPI_RVISOR_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define RVISOR_IOCTL_TYPE	0xBD

/*
 * On a virtual CPU, without an argument: opens a live stream of its exits and gives its descriptor. The vCPU
 * may be in KVM_RUN meanwhile. Closing the last copy of the descriptor ends the trace.
 *
 * read(2) gives whole records, as many as there are and as the buffer holds, and waits for one where there is
 * none (EAGAIN with O_NONBLOCK); EINVAL for a buffer shorter than a record. poll(2) says when there is one. The
 * vCPU never waits for the reader: records that find no place are lost, and the next one says how many.
 *
 * Errors: EBUSY where the vCPU is being traced; EMFILE, ENFILE, ENOMEM.
 */
#define RVISOR_TRACE_OPEN	_IO(RVISOR_IOCTL_TYPE, 0x00)

/* The records that wait for the reader at most. */
#define RVISOR_TRACE_RECORDS	4096

struct rvisor_trace_record {
	/* The host's TSC at the exit. */
	__u64 tsc;
	/* TSC cycles from then until the guest was entered again, its thread slept, or KVM_RUN returned. */
	__u64 handling;
	/* The guest's RIP: where the instruction stands that has exited. */
	__u64 rip;
	/* The exit qualification (SDM vol. 3, 29.2.1). */
	__u64 qualification;
	/* EPT violation: the guest-physical address. RDMSR and WRMSR: ECX. Otherwise RAX. */
	__u64 detail;
	/* The exit reason with its flags (SDM vol. 3, 26.9.1). */
	__u32 reason;
	/* Records that were lost before this one. */
	__u32 lost;
};

#endif
