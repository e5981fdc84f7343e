/* SPDX-License-Identifier: GPL-2.0 */
/* Listening to an eventfd from the kernel. Implemented in eventfd_glue.c. */
#ifndef RVISOR_EVENTFD_GLUE_H
#define RVISOR_EVENTFD_GLUE_H

struct eventfd_ctx;
struct rvisor_hook;
struct rvisor_queues;

/* Called in a worker but for the first, with the OWNER that the hook was made with. */
struct rvisor_hook_calls {
	/*
	 * The eventfd was signalled: called at once, with interrupts off and the wait queue's lock held, in any
	 * context but NMI. False where it must be left to a worker.
	 */
	bool (*try_signalled)(void *owner);
	/* The eventfd was signalled, once or more often. */
	void (*signalled)(void *owner);
	/* Its last descriptor was closed: the owner is to remove the hook. Called once. */
	void (*closed)(void *owner);
};

struct rvisor_queues *rvisor_queues_create(void);
void rvisor_queues_flush_closed(struct rvisor_queues *queues);
void rvisor_queues_destroy(struct rvisor_queues *queues);

struct rvisor_hook *rvisor_hook_attach(int fd, struct rvisor_queues *queues,
				       const struct rvisor_hook_calls *calls, void *owner);
void rvisor_hook_detach(struct rvisor_hook *hook);
struct eventfd_ctx *rvisor_hook_eventfd(const struct rvisor_hook *hook);

#endif
