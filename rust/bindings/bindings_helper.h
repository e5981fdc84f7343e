/* SPDX-License-Identifier: GPL-2.0 */
/* The kernel headers that the kernel crate's own bindings do not cover. */

#include <linux/kprobes.h>
#include <linux/kvm.h>
#include <linux/anon_inodes.h>
#include <linux/eventfd.h>
#include <linux/rcupdate.h>
#include <linux/entry-virt.h>
#include <linux/syscore_ops.h>
#include <asm/msr-index.h>
#include <asm/tsc.h>

#include "../../include/uapi/rvisor.h"
#include "../host/eventfd_glue.h"
#include "../host/glue.h"

/* What a thread sees to before it runs a guest, of its flags. */
const unsigned long RVISOR_GUEST_MODE_WORK = XFER_TO_GUEST_MODE_WORK;
