// SPDX-License-Identifier: GPL-2.0
/* Wrappers of the kernel's inline functions and macros, for Rust. See glue.h. */

#include <linux/anon_inodes.h>
#include <linux/cpu.h>
#include <linux/fs.h>
#include <linux/hw_breakpoint.h>
#include <linux/kprobes.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pgtable.h>
#include <linux/preempt.h>
#include <linux/percpu.h>
#include <linux/sched.h>
#include <linux/sched/smt.h>
#include <linux/smp.h>
#include <linux/thread_info.h>
#include <linux/uaccess.h>
#include <linux/vmstat.h>
#include <linux/vtime.h>
#include <linux/entry-virt.h>
#include <asm/cpu_entry_area.h>
#include <asm/debugreg.h>
#include <asm/desc.h>
#include <asm/fpu/xcr.h>
#include <asm/fsgsbase.h>
#include <asm/gsseg.h>
#include <asm/ibt.h>
#include <asm/mce.h>
#include <asm/msr.h>
#include <asm/nospec-branch.h>
#include <asm/tsc.h>
#include <trace/events/ipi.h>

#include "glue.h"

/*
 * The address to call NAME at, or 0. Where KVM is a module, what the kernel exports to it can be had by
 * name. Where it is built in, a kprobe's registration finds it; with IBT the probe lies behind the ENDBR,
 * which is where an indirect call must go.
 */
unsigned long rvisor_kernel_symbol(const char *name)
{
	struct kprobe probe = { .symbol_name = name };
	unsigned long address = (unsigned long)__symbol_get(name);

	if (address)
		return address;
	if (register_kprobe(&probe))
		return 0;
	address = (unsigned long)probe.addr;
	unregister_kprobe(&probe);
#ifdef CONFIG_X86_KERNEL_IBT
	if (*(u32 *)(address - ENDBR_INSN_SIZE) == gen_endbr())
		address -= ENDBR_INSN_SIZE;
#endif
	return address;
}

bool rvisor_cpu_has_vmx(void)
{
	return boot_cpu_has(X86_FEATURE_VMX);
}

bool rvisor_cpu_has_fred(void)
{
	return cpu_feature_enabled(X86_FEATURE_FRED);
}

/* A feature of the CPU's or a decision of the kernel's, as a bit. */
#define IF_CPU(feature, bit) (boot_cpu_has(feature) ? (bit) : 0)
#define IF_BUG(bug, bit) (boot_cpu_has_bug(bug) ? (bit) : 0)

u32 rvisor_host_speculation(void)
{
	return IF_CPU(X86_FEATURE_MSR_SPEC_CTRL, RVISOR_HOST_SPEC_CTRL) |
	       IF_CPU(X86_FEATURE_KERNEL_IBRS, RVISOR_HOST_KERNEL_IBRS) |
	       IF_CPU(X86_FEATURE_RSB_VMEXIT, RVISOR_HOST_RSB_VMEXIT) |
	       IF_CPU(X86_FEATURE_RSB_VMEXIT_LITE, RVISOR_HOST_RSB_VMEXIT_LITE) |
	       IF_CPU(X86_FEATURE_CLEAR_BHB_VMEXIT, RVISOR_HOST_CLEAR_BHB_VMEXIT) |
	       IF_CPU(X86_FEATURE_CLEAR_CPU_BUF_VM, RVISOR_HOST_CLEAR_CPU_BUFFERS) |
	       IF_CPU(X86_FEATURE_IBPB, RVISOR_HOST_IBPB) |
	       IF_CPU(X86_FEATURE_IBPB_EXIT_TO_USER, RVISOR_HOST_IBPB_EXIT_TO_USER) |
	       IF_CPU(X86_FEATURE_FLUSH_L1D, RVISOR_HOST_FLUSH_L1D) |
	       IF_BUG(X86_BUG_L1TF, RVISOR_HOST_L1TF) |
	       IF_BUG(X86_BUG_ITLB_MULTIHIT, RVISOR_HOST_ITLB_MULTIHIT) |
	       (cpu_mitigations_off() ? RVISOR_HOST_MITIGATIONS_OFF : 0) |
	       (sched_smt_active() ? RVISOR_HOST_SMT : 0);
}

/*
 * IA32_ARCH_CAPABILITIES, 0 where there is none, with the flaws that the kernel knows this CPU not to have
 * although the CPU is too old to say so.
 */
u64 rvisor_host_arch_capabilities(void)
{
	u64 value = 0;

	if (boot_cpu_has(X86_FEATURE_ARCH_CAPABILITIES))
		rdmsrq_safe(MSR_IA32_ARCH_CAPABILITIES, &value);
	if (!boot_cpu_has_bug(X86_BUG_CPU_MELTDOWN))
		value |= ARCH_CAP_RDCL_NO;
	if (!boot_cpu_has_bug(X86_BUG_SPEC_STORE_BYPASS))
		value |= ARCH_CAP_SSB_NO;
	if (!boot_cpu_has_bug(X86_BUG_MDS))
		value |= ARCH_CAP_MDS_NO;
	if (!boot_cpu_has_bug(X86_BUG_RFDS))
		value |= ARCH_CAP_RFDS_NO;
	if (!boot_cpu_has_bug(X86_BUG_ITS))
		value |= ARCH_CAP_ITS_NO;
	/* Without TSX there is no abort to be asynchronous, and nothing to say of it. */
	if (!boot_cpu_has(X86_FEATURE_RTM))
		value &= ~ARCH_CAP_TAA_NO;
	else if (!boot_cpu_has_bug(X86_BUG_TAA))
		value |= ARCH_CAP_TAA_NO;
	return value;
}

/* EBX and EDX of CPUID leaf 7 as far as the kernel uses them: it clears what bad microcode offers. */
u32 rvisor_host_leaf_7_ebx(void)
{
	return boot_cpu_data.x86_capability[CPUID_7_0_EBX];
}

u32 rvisor_host_leaf_7_edx(void)
{
	return boot_cpu_data.x86_capability[CPUID_7_EDX];
}

bool rvisor_static_key_enabled(const void *key)
{
	return static_key_enabled((struct static_key *)key);
}

/* What IA32_SPEC_CTRL holds for the current thread. Interrupts are off. */
u64 rvisor_host_spec_ctrl(void)
{
	return this_cpu_read(x86_spec_ctrl_current);
}

/* A guest has run on this CPU: its branch predictions are not for userspace. Interrupts are off. */
void rvisor_ibpb_before_user(void)
{
	this_cpu_write(x86_ibpb_exit_to_user, true);
}

/* The guest that was entered last on this CPU; a number that is never used again, 0 before the first. */
static DEFINE_PER_CPU(u64, rvisor_last_guest);

/* Whether another guest than GUEST was entered last here; from now on it is GUEST. Interrupts are off. */
bool rvisor_is_other_guest(u64 guest)
{
	if (this_cpu_read(rvisor_last_guest) == guest)
		return false;
	this_cpu_write(rvisor_last_guest, guest);
	return true;
}

bool rvisor_cpu_has_pebs(void)
{
	return boot_cpu_has(X86_FEATURE_PEBS);
}

void rvisor_irq_disable(void)
{
	local_irq_disable();
}

void rvisor_irq_enable(void)
{
	local_irq_enable();
}

unsigned long rvisor_irq_save(void)
{
	unsigned long flags;

	local_irq_save(flags);
	return flags;
}

/* Whether VMX is on, and ours to use, on this CPU. */
static DEFINE_PER_CPU(bool, rvisor_vmx_on);

void rvisor_set_vmx_on(bool on)
{
	this_cpu_write(rvisor_vmx_on, on);
}

bool rvisor_vmx_is_on(void)
{
	return this_cpu_read(rvisor_vmx_on);
}

void rvisor_on_each_cpu(void (*function)(void *))
{
	on_each_cpu(function, NULL, 1);
}

/*
 * Turns interrupts off on a CPU whose VMX is on; returns the flags from before, or 0 where this CPU has
 * none. A CPU that goes down loses its VMX before the last threads have left it: those go to another.
 */
unsigned long rvisor_irq_save_vmx(void)
{
	unsigned long flags;
	bool leaving;

	for (;;) {
		local_irq_save(flags);
		if (likely(this_cpu_read(rvisor_vmx_on)))
			return flags;
		leaving = !cpu_active(raw_smp_processor_id());
		local_irq_restore(flags);
		if (!leaving)
			return 0;
		schedule();
	}
}

void rvisor_irq_restore(unsigned long flags)
{
	local_irq_restore(flags);
}

/* What ticks of the clock find from here on is a guest's time, and the thread's user time. */
void rvisor_guest_time_begin(void)
{
	local_irq_disable();
	vtime_account_guest_enter();
	local_irq_enable();
}

/* And from here on the kernel's again. */
void rvisor_guest_time_end(void)
{
	local_irq_disable();
	vtime_account_guest_exit();
	local_irq_enable();
}

void rvisor_preempt_disable(void)
{
	preempt_disable();
}

void rvisor_preempt_enable(void)
{
	preempt_enable();
}

unsigned int rvisor_cpu_id(void)
{
	return raw_smp_processor_id();
}

int rvisor_mutex_lock_killable(struct mutex *mutex)
{
	return mutex_lock_killable(mutex);
}

unsigned long rvisor_thread_flags(void)
{
	return read_thread_flags();
}

struct mm_struct *rvisor_current_mm(void)
{
	return current->mm;
}

/* The FS base that current has while it is in userspace. Interrupts are off. */
unsigned long rvisor_user_fs_base(void)
{
	return x86_fsbase_read_cpu();
}

unsigned long rvisor_host_gdt(void)
{
	return (unsigned long)get_current_gdt_ro();
}

unsigned long rvisor_host_tss(void)
{
	return (unsigned long)&get_cpu_entry_area(raw_smp_processor_id())->tss.x86_tss;
}

unsigned long rvisor_host_idt(void)
{
	struct desc_ptr idt;

	store_idt(&idt);
	return idt.address;
}

/*
 * VM exit leaves the GDT's limit at 64 KiB and the TSS's without its I/O bitmap. The kernel reloads the
 * latter on its way to a thread that has one.
 */
void rvisor_restore_descriptor_limits(void)
{
	this_cpu_write(__tss_limit_invalid, true);
	load_fixmap_gdt(raw_smp_processor_id());
}

/*
 * Gives the thread its selectors back. Another thread may have changed the LDT meanwhile, so a fault
 * must be survived: the null selector is loaded then. The LDT itself is the address space's.
 */
void rvisor_load_selectors(u16 es, u16 ds, u16 fs, u16 gs, u16 ldtr)
{
	/* Not load_ldt(), which kernels that can be Xen's guests don't have. */
	if (ldtr)
		asm volatile("lldt %w0" : : "r"(ldtr));
	loadsegment(ds, ds);
	loadsegment(es, es);
	loadsegment(fs, fs);
	load_gs_index(gs);
}

bool rvisor_hw_breakpoints_active(void)
{
	return hw_breakpoint_active();
}

/*
 * Handles a machine check that came in guest mode. The guest is this thread's as its userspace is, so an
 * error that only who ran can be made to pay for kills the thread, where one of the kernel's own would
 * panic: that takes registers as of userspace, which "int 18" could not give.
 */
void rvisor_machine_check(void)
{
#ifdef CONFIG_X86_MCE
	struct pt_regs regs = {};

	regs.cs = __USER_CS;
	regs.flags = X86_EFLAGS_IF;
	do_machine_check(&regs);
#endif
}

/*
 * The kernel warns of a reschedule interrupt to an offline CPU. With preemption off the CPU can't go
 * offline between the question and the interrupt; the caller may be late with a CPU that has gone.
 */
void rvisor_kick_cpu(unsigned int cpu)
{
	unsigned int here = get_cpu();

	if (cpu != here && cpu_online(cpu))
		smp_send_reschedule(cpu);
	put_cpu();
}

/* 2^ORDER pages that belong to no process. */
void *rvisor_pages_alloc(unsigned int order)
{
	return (void *)__get_free_pages(GFP_KERNEL, order);
}

void rvisor_pages_free(void *pages, unsigned int order)
{
	free_pages((unsigned long)pages, order);
}

void *rvisor_page_alloc(void)
{
	return (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
}

void rvisor_page_free(void *page)
{
	free_page((unsigned long)page);
}

u64 rvisor_virt_to_phys(const void *address)
{
	return __pa(address);
}

void *rvisor_phys_to_virt(u64 address)
{
	return __va(address);
}

u64 rvisor_page_to_phys(struct page *page)
{
	return page_to_phys(page);
}

void rvisor_page_put(struct page *page)
{
	put_page(page);
}

/*
 * Says that a page that the host's page tables have writable will be written. Only the flag: whoever
 * keeps account of writable mappings of a file did so when the host's entry became writable.
 */
void rvisor_page_set_dirty(struct page *page)
{
	SetPageDirty(page);
}

/* Counts a page as a page table of a guest (SecPageTables, sec_pagetables), or no longer. */
void rvisor_count_table(const void *page, int number)
{
	mod_lruvec_page_state(virt_to_page(page), NR_SECONDARY_PAGETABLE, number);
}

void rvisor_cond_resched(void)
{
	cond_resched();
}

struct page *rvisor_virt_to_page(const void *address)
{
	return virt_to_page(address);
}

/* log2 of the size of the page that the host's page tables have at ADDRESS; PAGE_SHIFT if in doubt. */
unsigned int rvisor_host_mapping_shift(struct mm_struct *mm, unsigned long address)
{
	unsigned int shift = PAGE_SHIFT;
	unsigned long flags;
	pgd_t pgd;
	p4d_t p4d;
	pud_t pud;
	pmd_t pmd;

	/* With interrupts off no page table that is reachable here can be freed. */
	local_irq_save(flags);
	pgd = READ_ONCE(*pgd_offset(mm, address));
	if (pgd_none(pgd))
		goto out;
	p4d = READ_ONCE(*p4d_offset_lockless(pgd_offset(mm, address), pgd, address));
	if (p4d_none(p4d) || !p4d_present(p4d))
		goto out;
	pud = READ_ONCE(*pud_offset_lockless(&p4d, p4d, address));
	if (pud_none(pud) || !pud_present(pud))
		goto out;
	if (pud_leaf(pud)) {
		shift = PUD_SHIFT;
		goto out;
	}
	pmd = READ_ONCE(*pmd_offset_lockless(&pud, pud, address));
	if (pmd_none(pmd) || !pmd_present(pmd))
		goto out;
	if (pmd_leaf(pmd))
		shift = PMD_SHIFT;
out:
	local_irq_restore(flags);
	return shift;
}

bool rvisor_user_range_ok(unsigned long address, unsigned long size)
{
	return access_ok((void __user *)address, size);
}

u64 rvisor_rdmsr_safe(u32 index, int *error)
{
	u64 value = 0;

	*error = rdmsrq_safe(index, &value);
	return *error ? 0 : value;
}

u64 rvisor_host_xcr0(void)
{
	return boot_cpu_has(X86_FEATURE_OSXSAVE) ? xgetbv(XCR_XFEATURE_ENABLED_MASK) : 0;
}

unsigned long rvisor_tsc_khz(void)
{
	return tsc_khz;
}

/* Links for a list of pages that must keep their contents. */
void rvisor_page_set_link(const void *page, u64 link)
{
	set_page_private(virt_to_page(page), link);
}

u64 rvisor_page_link(const void *page)
{
	return page_private(virt_to_page(page));
}

/* Reads 4 or 8 bytes of the current process in one load. */
int rvisor_read_user(unsigned long address, unsigned int size, u64 *value)
{
	u32 low;
	int error;

	if (size == 8)
		return get_user(*value, (u64 __user *)address);
	error = get_user(low, (u32 __user *)address);
	*value = low;
	return error;
}

/* Likewise 8 bytes: the walk of page tables does it for each level. */
bool rvisor_read_user64(unsigned long address, u64 *value)
{
	return !get_user(*value, (u64 __user *)address);
}

#define CMPXCHG_USER(type, label) ({							\
	type expected = old;								\
	__try_cmpxchg_user((type __user *)address, &expected, (type)new, label);	\
})

/*
 * Replaces 1, 2, 4 or 8 bytes of the current process if they are still OLD, atomically.
 * 0 if they were, 1 if not, -EFAULT.
 */
int rvisor_cmpxchg_user(unsigned long address, unsigned int size, u64 old, u64 new)
{
	if (!access_ok((void __user *)address, size))
		return -EFAULT;
	switch (size) {
	case 1:
		return CMPXCHG_USER(u8, fault1);
	case 2:
		return CMPXCHG_USER(u16, fault2);
	case 4:
		return CMPXCHG_USER(u32, fault4);
	case 8:
		return CMPXCHG_USER(u64, fault8);
	}
	return -EFAULT;
}

/*
 * Likewise 16 bytes, aligned; OLD and NEW have two words each. -EOPNOTSUPP where the CPU can't.
 */
int rvisor_cmpxchg16_user(unsigned long address, const u64 *old, const u64 *new)
{
	u64 __user *place = (u64 __user *)address;
	u64 low = old[0], high = old[1];
	bool done;

	if (!boot_cpu_has(X86_FEATURE_CX16))
		return -EOPNOTSUPP;
	if (!user_access_begin(place, 16))
		return -EFAULT;
	asm_goto_output("1: lock cmpxchg16b %[place]\n"
			_ASM_EXTABLE_UA(1b, %l[fault])
			: "=@ccz" (done), [place] "+m" (*(u64 (*)[2])place), "+a" (low), "+d" (high)
			: "b" (new[0]), "c" (new[1])
			: "memory"
			: fault);
	user_access_end();
	return done ? 0 : 1;
fault:
	user_access_end();
	return -EFAULT;
}

unsigned int rvisor_online_cpus(void)
{
	return num_online_cpus();
}

/* A file that is read alone, at any place too, or one for ioctls and mappings. */
struct file *rvisor_anon_file(const char *name, const struct file_operations *operations, void *data, bool is_read,
			      bool is_seekable)
{
	return anon_inode_getfile_fmode(name, operations, data, is_read ? O_RDONLY : O_RDWR,
					is_seekable ? FMODE_PREAD : 0);
}
