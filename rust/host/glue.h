/* SPDX-License-Identifier: GPL-2.0 */
/* What Rust can't call: the kernel's inline functions and macros. Implemented in glue.c. */
#ifndef RVISOR_GLUE_H
#define RVISOR_GLUE_H

#include <linux/types.h>

struct file;
struct file_operations;
struct mm_struct;
struct mutex;
struct page;
struct preempt_notifier;

unsigned long rvisor_kernel_symbol(const char *name);

bool rvisor_cpu_has_vmx(void);
bool rvisor_cpu_has_fred(void);
bool rvisor_cpu_has_pebs(void);

/* What the host's kernel does against speculative execution, for rvisor_host_speculation(). */
#define RVISOR_HOST_SPEC_CTRL		(1u << 0)
#define RVISOR_HOST_KERNEL_IBRS		(1u << 1)
#define RVISOR_HOST_RSB_VMEXIT		(1u << 2)
#define RVISOR_HOST_RSB_VMEXIT_LITE	(1u << 3)
#define RVISOR_HOST_CLEAR_BHB_VMEXIT	(1u << 4)
#define RVISOR_HOST_CLEAR_CPU_BUFFERS	(1u << 5)
#define RVISOR_HOST_IBPB		(1u << 6)
#define RVISOR_HOST_IBPB_EXIT_TO_USER	(1u << 7)
#define RVISOR_HOST_L1TF		(1u << 8)
#define RVISOR_HOST_FLUSH_L1D		(1u << 9)
#define RVISOR_HOST_ITLB_MULTIHIT	(1u << 10)
#define RVISOR_HOST_MITIGATIONS_OFF	(1u << 11)
#define RVISOR_HOST_SMT			(1u << 12)

u32 rvisor_host_speculation(void);
u64 rvisor_host_arch_capabilities(void);
u32 rvisor_host_leaf_7_ebx(void);
u32 rvisor_host_leaf_7_edx(void);
bool rvisor_static_key_enabled(const void *key);
u64 rvisor_host_spec_ctrl(void);
void rvisor_ibpb_before_user(void);
bool rvisor_is_other_guest(u64 guest);

void rvisor_irq_disable(void);
void rvisor_irq_enable(void);
unsigned long rvisor_irq_save(void);
unsigned long rvisor_irq_save_vmx(void);
void rvisor_set_vmx_on(bool on);
bool rvisor_vmx_is_on(void);
void rvisor_on_each_cpu(void (*function)(void *));
void rvisor_irq_restore(unsigned long flags);
void rvisor_guest_time_begin(void);
void rvisor_guest_time_end(void);
void rvisor_preempt_disable(void);
void rvisor_preempt_enable(void);
unsigned int rvisor_cpu_id(void);
unsigned int rvisor_online_cpus(void);

int rvisor_mutex_lock_killable(struct mutex *mutex);
unsigned long rvisor_thread_flags(void);
struct mm_struct *rvisor_current_mm(void);
unsigned long rvisor_user_fs_base(void);

unsigned long rvisor_host_gdt(void);
unsigned long rvisor_host_tss(void);
unsigned long rvisor_host_idt(void);
void rvisor_restore_descriptor_limits(void);
void rvisor_load_selectors(u16 es, u16 ds, u16 fs, u16 gs, u16 ldtr);
bool rvisor_hw_breakpoints_active(void);
void rvisor_machine_check(void);

void rvisor_kick_cpu(unsigned int cpu);

void *rvisor_pages_alloc(unsigned int order);
void rvisor_pages_free(void *pages, unsigned int order);
void *rvisor_page_alloc(void);
void rvisor_page_free(void *page);
u64 rvisor_virt_to_phys(const void *address);
void *rvisor_phys_to_virt(u64 address);
u64 rvisor_page_to_phys(struct page *page);
void rvisor_page_put(struct page *page);
void rvisor_page_set_dirty(struct page *page);
void rvisor_count_table(const void *page, int number);
void rvisor_cond_resched(void);
struct page *rvisor_virt_to_page(const void *address);
void rvisor_page_set_link(const void *page, u64 link);
u64 rvisor_page_link(const void *page);
unsigned int rvisor_host_mapping_shift(struct mm_struct *mm, unsigned long address);
int rvisor_read_user(unsigned long address, unsigned int size, u64 *value);
bool rvisor_read_user64(unsigned long address, u64 *value);
int rvisor_cmpxchg_user(unsigned long address, unsigned int size, u64 old, u64 new);
int rvisor_cmpxchg16_user(unsigned long address, const u64 *old, const u64 *new);
bool rvisor_user_range_ok(unsigned long address, unsigned long size);

u64 rvisor_rdmsr_safe(u32 index, int *error);
u64 rvisor_host_xcr0(void);
unsigned long rvisor_tsc_khz(void);

struct file *rvisor_anon_file(const char *name, const struct file_operations *operations, void *data, bool is_read,
			      bool is_seekable);

#endif
