// SPDX-License-Identifier: GPL-2.0-only
/*
 * Requests: a word in this CPU's slot, its doorbell, and a wait until the
 * host has put 0 into the slot.
 */
#include <linux/delay.h>
#include <linux/io.h>
#include <linux/ktime.h>
#include <linux/smp.h>

#include "coiommu.h"

#define TIMEOUT_S	5
#define TIMEOUT_NS	(TIMEOUT_S * NSEC_PER_SEC)
/* More than a wait between two looks takes: the VM stood still meanwhile. */
#define LONGEST_STEP_NS	(100 * NSEC_PER_MSEC)

static void declare_dead(struct coiommu *c)
{
	if (cmpxchg(&c->state, COIOMMU_ACTIVE, COIOMMU_DEAD) != COIOMMU_ACTIVE)
		return;
	dev_err(&c->pdev->dev,
		"no answer for %u s: it is dead, and its endpoints will be disconnected\n",
		TIMEOUT_S);
	schedule_work(&c->disconnect);
}

/* With interrupts off, so a clock that wraps within seconds may do so here. */
static int wait_for_answer(struct coiommu *c, const void __iomem *slot)
{
	struct coiommu_stats *stats = &this_cpu_ptr(c->cpus)->stats;
	u64 last = ktime_get_ns();
	u64 waited = 0;
	int err = 0;

	while (readq(slot)) {
		u64 now = ktime_get_ns();

		if (now > last)
			waited += min_t(u64, now - last, LONGEST_STEP_NS);
		last = now;
		if (waited >= TIMEOUT_NS) {
			stats->timeouts++;
			declare_dead(c);
		}
		if (READ_ONCE(c->state) != COIOMMU_ACTIVE) {
			err = -ENODEV;
			break;
		}
		udelay(1);
	}
	stats->longest_wait_ns = max(stats->longest_wait_ns, waited);
	return err;
}

/**
 * coiommu_request() - ask the host to pin, and wait until it has tried
 * @c: the device
 * @request: the word for the slot
 * @pages: how many pages that is about
 *
 * To be called with interrupts off: the slot is this CPU's.
 *
 * Return: 0 if it was answered, which leaves PINNED to look at, or -ENODEV if it
 * was not and will not be. Then the host may still read a batch and write
 * tables at any time, so neither must be freed.
 */
int coiommu_request(struct coiommu *c, u64 request, unsigned int pages)
{
	struct coiommu_stats *stats = &this_cpu_ptr(c->cpus)->stats;
	unsigned int cpu = smp_processor_id();
	void __iomem *slot = c->slots + cpu * sizeof(u64);

	if (READ_ONCE(c->state) != COIOMMU_ACTIVE)
		return -ENODEV;
	stats->requests++;
	stats->requested_pages += pages;
	/* Each comes after all memory writes before it. */
	writeq(request, slot);
	writeb(1, c->regs + COIOMMU_REG_DOORBELLS + cpu);
	return wait_for_answer(c, slot);
}
