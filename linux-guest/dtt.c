// SPDX-License-Identifier: GPL-2.0-only
/*
 * The tables of the DTT.
 *
 * A table, once entered, stays until the device is deactivated. A full tree
 * takes 1/1024 of the memory it speaks of, so there is little to win by
 * freeing tables early, and nothing to park the host for.
 */
#include <linux/gfp.h>
#include <linux/io.h>

#include "coiommu.h"

static void *pool_get(struct coiommu_pool *pool)
{
	void *page = NULL;
	unsigned long flags;

	raw_spin_lock_irqsave(&pool->lock, flags);
	if (pool->nr)
		page = pool->pages[--pool->nr];
	raw_spin_unlock_irqrestore(&pool->lock, flags);
	if (READ_ONCE(pool->nr) < COIOMMU_POOL_PAGES / 2)
		schedule_work(&pool->refill);
	return page;
}

/* Takes a page of zeros; false if the pool is full. */
static bool pool_put(struct coiommu_pool *pool, void *page)
{
	unsigned long flags;
	bool room;

	raw_spin_lock_irqsave(&pool->lock, flags);
	room = pool->nr < COIOMMU_POOL_PAGES;
	if (room)
		pool->pages[pool->nr++] = page;
	raw_spin_unlock_irqrestore(&pool->lock, flags);
	return room;
}

/*
 * Puts one more page into the pool; false if there is none. Not with
 * interrupts off by our own doing: PREEMPT_RT allocates nothing there.
 */
bool coiommu_dtt_top_up(struct coiommu_dtt *dtt, gfp_t gfp)
{
	void *page = (void *)get_zeroed_page(gfp);

	if (!page)
		return false;
	if (!pool_put(&dtt->pool, page))
		free_page((unsigned long)page);
	return true;
}

static void pool_refill(struct work_struct *work)
{
	struct coiommu_pool *pool =
		container_of(work, struct coiommu_pool, refill);
	struct coiommu_dtt *dtt = container_of(pool, struct coiommu_dtt, pool);

	while (READ_ONCE(pool->nr) < COIOMMU_POOL_PAGES)
		if (!coiommu_dtt_top_up(dtt, GFP_KERNEL))
			return;
}

/* Enters a new table, or finds the one that another CPU was first to enter. */
static u64 enter_table(struct coiommu_dtt *dtt, u64 *entry)
{
	void *page = pool_get(&dtt->pool);
	u64 new, old;

	if (!page)
		return 0;
	new = virt_to_phys(page) | COIOMMU_DIR_PRESENT;
	/* Fully ordered: the page's zeros are seen before the entry. */
	old = cmpxchg(entry, 0, new);
	if (!old) {
		atomic_inc(&dtt->tables);
		return new;
	}
	if (!pool_put(&dtt->pool, page))
		free_page((unsigned long)page);
	return old;
}

/**
 * coiommu_dtt_leaves() - find the leaf table of a page
 * @dtt: the tables
 * @gfn: the page; the tree must cover it
 * @create: whether to enter the tables that are missing on the way
 *
 * Return: the table, whose word for the page is at coiommu_leaf_index(), or
 * NULL: there is none, or with @create, the pool is empty.
 */
u32 *coiommu_dtt_leaves(struct coiommu_dtt *dtt, u64 gfn, bool create)
{
	void *table = dtt->root;
	unsigned int level;

	for (level = dtt->levels; level > 1; level--) {
		u64 *entry = (u64 *)table + coiommu_dir_index(gfn, level);
		u64 next = READ_ONCE(*entry);

		if (!(next & COIOMMU_DIR_PRESENT)) {
			next = create ? enter_table(dtt, entry) : 0;
			if (!next)
				return NULL;
		}
		table = phys_to_virt(next & COIOMMU_DIR_ADDR);
	}
	return table;
}

int coiommu_dtt_init(struct coiommu_dtt *dtt, unsigned int levels)
{
	raw_spin_lock_init(&dtt->pool.lock);
	INIT_WORK(&dtt->pool.refill, pool_refill);
	dtt->levels = levels;
	dtt->root = (u64 *)get_zeroed_page(GFP_KERNEL);
	if (!dtt->root)
		return -ENOMEM;
	atomic_set(&dtt->tables, 1);
	while (dtt->pool.nr < COIOMMU_POOL_PAGES)
		if (!coiommu_dtt_top_up(dtt, GFP_KERNEL))
			return -ENOMEM;
	return 0;
}

void coiommu_dtt_stop_refill(struct coiommu_dtt *dtt)
{
	cancel_work_sync(&dtt->pool.refill);
}

/* Goes as deep as there are levels: five at most. */
static void free_table(u64 *table, unsigned int level)
{
	unsigned int i;

	for (i = 0; level > 1 && i < 1U << COIOMMU_DIR_BITS; i++)
		if (table[i] & COIOMMU_DIR_PRESENT)
			free_table(phys_to_virt(table[i] & COIOMMU_DIR_ADDR),
				   level - 1);
	free_page((unsigned long)table);
}

/* Frees what coiommu_dtt_init() got, as far as it came. */
void coiommu_dtt_free(struct coiommu_dtt *dtt)
{
	while (dtt->pool.nr)
		free_page((unsigned long)dtt->pool.pages[--dtt->pool.nr]);
	if (dtt->root)
		free_table(dtt->root, dtt->levels);
}
