// SPDX-License-Identifier: GPL-2.0
/*
 * Listening to an eventfd: a place on its wait queue, whose wake-up does the work where it can at once, and
 * leaves it to a worker where it can't.
 */

#include <linux/err.h>
#include <linux/eventfd.h>
#include <linux/file.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "eventfd_glue.h"

struct rvisor_hook {
	wait_queue_entry_t wait;
	struct eventfd_ctx *eventfd;
	struct work_struct signalled;
	struct work_struct closed;
	struct rvisor_queues *queues;
	const struct rvisor_hook_calls *calls;
	void *owner;
};

struct rvisor_queues {
	struct workqueue_struct *signalled;
	/* Apart from the other: its work waits for that of the same hook there. */
	struct workqueue_struct *closed;
};

void rvisor_queues_destroy(struct rvisor_queues *queues)
{
	if (queues->closed)
		destroy_workqueue(queues->closed);
	if (queues->signalled)
		destroy_workqueue(queues->signalled);
	kfree(queues);
}

struct rvisor_queues *rvisor_queues_create(void)
{
	struct rvisor_queues *queues = kzalloc(sizeof(*queues), GFP_KERNEL);

	if (!queues)
		return NULL;
	/* Before ordinary threads: an interrupt must not wait for a guest that computes. */
	queues->signalled = alloc_workqueue("rvisor", WQ_PERCPU | WQ_HIGHPRI, 0);
	queues->closed = alloc_workqueue("rvisor-close", WQ_UNBOUND, 0);
	if (queues->signalled && queues->closed)
		return queues;
	rvisor_queues_destroy(queues);
	return NULL;
}

void rvisor_queues_flush_closed(struct rvisor_queues *queues)
{
	flush_workqueue(queues->closed);
}

static void signalled_work(struct work_struct *work)
{
	struct rvisor_hook *hook = container_of(work, struct rvisor_hook, signalled);

	hook->calls->signalled(hook->owner);
}

static void closed_work(struct work_struct *work)
{
	struct rvisor_hook *hook = container_of(work, struct rvisor_hook, closed);

	/* The hook may be gone when this returns. */
	hook->calls->closed(hook->owner);
}

/* Called with the wait queue's lock held and interrupts off, in any context. */
static int wake(wait_queue_entry_t *wait, unsigned int mode, int flags, void *key)
{
	struct rvisor_hook *hook = container_of(wait, struct rvisor_hook, wait);
	__poll_t events = key_to_poll(key);
	u64 count;

	if (events & EPOLLHUP)
		queue_work(hook->queues->closed, &hook->closed);
	if (!(events & EPOLLIN))
		return 0;
	/* The event is taken here, so that nobody else gets it. */
	eventfd_ctx_do_read(hook->eventfd, &count);
	if (!hook->calls->try_signalled(hook->owner))
		queue_work(hook->queues->signalled, &hook->signalled);
	return 1;
}

struct registration {
	poll_table table;
	struct rvisor_hook *hook;
	int error;
};

static void add(struct file *file, wait_queue_head_t *head, poll_table *table)
{
	struct registration *registration = container_of(table, struct registration, table);

	/* -EBUSY where another hypervisor's hook is there: an event goes to one only. */
	registration->error = add_wait_queue_priority_exclusive(head, &registration->hook->wait);
}

/*
 * Listens to the eventfd FD. An event that it already has is passed on too. OWNER must stay valid until
 * the hook is detached. An ERR_PTR on failure.
 */
struct rvisor_hook *rvisor_hook_attach(int fd, struct rvisor_queues *queues,
				       const struct rvisor_hook_calls *calls, void *owner)
{
	struct registration registration = { .error = -EINVAL };
	struct rvisor_hook *hook;
	__poll_t events;
	long error;

	CLASS(fd, file)(fd);
	if (fd_empty(file))
		return ERR_PTR(-EBADF);
	hook = kzalloc(sizeof(*hook), GFP_KERNEL_ACCOUNT);
	if (!hook)
		return ERR_PTR(-ENOMEM);
	hook->eventfd = eventfd_ctx_fileget(fd_file(file));
	if (IS_ERR(hook->eventfd)) {
		error = PTR_ERR(hook->eventfd);
		goto free;
	}
	hook->queues = queues;
	hook->calls = calls;
	hook->owner = owner;
	INIT_WORK(&hook->signalled, signalled_work);
	INIT_WORK(&hook->closed, closed_work);
	init_waitqueue_func_entry(&hook->wait, wake);
	registration.hook = hook;
	init_poll_funcptr(&registration.table, add);
	events = vfs_poll(fd_file(file), &registration.table);
	error = registration.error;
	if (error)
		goto put;
	if (events & EPOLLIN)
		queue_work(queues->signalled, &hook->signalled);
	return hook;
put:
	eventfd_ctx_put(hook->eventfd);
free:
	kfree(hook);
	return ERR_PTR(error);
}

/*
 * Stops listening. No call is under way when this returns and none comes later, but for the `closed` that
 * this may be called from. May sleep.
 */
void rvisor_hook_detach(struct rvisor_hook *hook)
{
	u64 count;

	eventfd_ctx_remove_wait_queue(hook->eventfd, &hook->wait, &count);
	flush_work(&hook->signalled);
	if (current_work() != &hook->closed)
		cancel_work_sync(&hook->closed);
	eventfd_ctx_put(hook->eventfd);
	kfree(hook);
}

struct eventfd_ctx *rvisor_hook_eventfd(const struct rvisor_hook *hook)
{
	return hook->eventfd;
}
