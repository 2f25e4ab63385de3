// SPDX-License-Identifier: GPL-2.0-only
/*
 * Counting pages in the DTT.
 *
 * A call's pages are counted, and those that are not pinned are asked for,
 * with interrupts off: so a CPU has one such call at a time under way, and
 * whoever looks at the DTT finds every other counted page pinned. A long call
 * goes in pieces, each of which ends with all its pages pinned.
 */
#include <linux/io.h>
#include <linux/irqflags.h>

#include "coiommu.h"

/* A call under way. */
struct call {
	struct coiommu *c;
	u16 bdf;
	unsigned long flags;
	struct coiommu_cpu *cpu;
	u64 counted;		/* pages, from the call's first on */
	u64 hits;
	unsigned int room;	/* pages that may still join this piece */
	unsigned int missing;	/* those of the piece that are in the batch */
};

static void begin_piece(struct call *call)
{
	local_irq_save(call->flags);
	call->cpu = this_cpu_ptr(call->c->cpus);
	call->room = COIOMMU_BATCH_MAX;
	call->missing = 0;
}

static void end_piece(struct call *call)
{
	local_irq_restore(call->flags);
}

static bool is_pinned(struct coiommu *c, u64 gfn)
{
	u32 *leaves = coiommu_dtt_leaves(&c->dtt, gfn, false);

	return leaves && READ_ONCE(leaves[coiommu_leaf_index(gfn)]) &
			 COIOMMU_LEAF_PINNED;
}

/* Asks for the pages of the piece that were not pinned. */
static int pin_missing(struct call *call)
{
	struct coiommu_batch *batch = call->cpu->batch;
	unsigned int i, missing = call->missing;
	u64 request;
	int err;

	if (!missing)
		return 0;
	call->missing = 0;
	if (missing == 1) {
		request = coiommu_request_page(le64_to_cpu(batch->gfns[0]),
					       call->bdf);
	} else {
		batch->bdf = cpu_to_le16(call->bdf);
		batch->nr_pages = cpu_to_le64(missing);
		request = coiommu_request_batch(virt_to_phys(batch));
	}
	err = coiommu_request(call->c, request, missing);
	if (err)
		return err;
	for (i = 0; i < missing; i++)
		if (!is_pinned(call->c, le64_to_cpu(batch->gfns[i])))
			return -EACCES;
	return 0;
}

/*
 * One more map of a page. The atomic is fully ordered: either the host sees
 * the count and does not unpin, or we see that it unpinned.
 */
static int count_page(struct call *call, u32 *leaf, u64 gfn)
{
	u32 old = READ_ONCE(*leaf);
	u32 new;

	do {
		if (!coiommu_leaf_up(old, call->c->count_limit, &new))
			return -EBUSY;
	} while (!try_cmpxchg(leaf, &old, new));

	call->counted++;
	call->room--;
	if (old & COIOMMU_LEAF_PINNED)
		call->hits++;
	else
		call->cpu->batch->gfns[call->missing++] = cpu_to_le64(gfn);
	return 0;
}

static int count_pages(struct call *call, dma_addr_t addr, size_t len)
{
	u64 gfn = coiommu_gfn(addr);
	u64 end = gfn + coiommu_nr_pages(addr, len);
	u32 *leaves = NULL;
	int err;

	if (end > gfn && (end - 1) >> coiommu_gfn_bits(call->c->dtt.levels))
		return -ERANGE;
	for (; gfn < end; gfn++) {
		if (!leaves || !coiommu_leaf_index(gfn))
			leaves = coiommu_dtt_leaves(&call->c->dtt, gfn, true);
		if (!leaves)
			return -EAGAIN;
		if (!call->room) {
			err = pin_missing(call);
			if (err)
				return err;
			end_piece(call);
			begin_piece(call);
		}
		err = count_page(call, &leaves[coiommu_leaf_index(gfn)], gfn);
		if (err)
			return err;
	}
	return 0;
}

/* One map of a page less; false if there was none. */
static bool uncount_page(u32 *leaf)
{
	u32 old = READ_ONCE(*leaf);
	u32 new;

	do {
		if (!coiommu_leaf_down(old, &new))
			return false;
	} while (!try_cmpxchg(leaf, &old, new));
	return true;
}

/* Undoes the first @nr counts of a buffer's pages. Returns how many it has. */
static u64 uncount_pages(struct coiommu *c, dma_addr_t addr, size_t len, u64 nr)
{
	u64 pages = coiommu_nr_pages(addr, len);
	u64 gfn = coiommu_gfn(addr);
	u64 end = gfn + min(pages, nr);
	u32 *leaves = NULL;

	for (; gfn < end; gfn++) {
		if (!leaves || !coiommu_leaf_index(gfn))
			leaves = coiommu_dtt_leaves(&c->dtt, gfn, false);
		if (!leaves || !uncount_page(&leaves[coiommu_leaf_index(gfn)])) {
			this_cpu_inc(c->cpus->stats.underflows);
			WARN_ONCE(1, "coiommu: gfn %#llx unmapped more often than mapped\n",
				  gfn);
		}
	}
	return pages;
}

static void uncount_sg(struct coiommu *c, struct scatterlist *sgl,
		       unsigned int nents, u64 nr)
{
	struct scatterlist *sg;
	unsigned int i;

	for_each_sg(sgl, sg, nents, i) {
		u64 pages = uncount_pages(c, sg_dma_address(sg),
					  sg_dma_len(sg), nr);

		if (pages >= nr)
			return;
		nr -= pages;
	}
}

/*
 * One try at a call: all of it or nothing. It is undone before interrupts
 * come back, so that no other call of this CPU comes between.
 */
static int try_track(struct coiommu_endpoint *ep, struct scatterlist *sgl,
		     unsigned int nents)
{
	struct call call = { .c = ep->c, .bdf = ep->bdf };
	struct scatterlist *sg;
	unsigned int i;
	int err = 0;

	begin_piece(&call);
	if (READ_ONCE(ep->c->state) != COIOMMU_ACTIVE)
		err = -ENODEV;
	for_each_sg(sgl, sg, nents, i) {
		if (err)
			break;
		err = count_pages(&call, sg_dma_address(sg), sg_dma_len(sg));
	}
	if (!err)
		err = pin_missing(&call);
	if (err) {
		uncount_sg(ep->c, sgl, nents, call.counted);
	} else {
		call.cpu->stats.maps++;
		call.cpu->stats.pages += call.counted;
		call.cpu->stats.hits += call.hits;
	}
	end_piece(&call);
	return err;
}

/* Counts a failure, tells of it, and turns it into what callers expect. */
static int map_failed(struct coiommu_endpoint *ep, int err)
{
	struct coiommu_cpu __percpu *cpus = ep->c->cpus;
	struct device *dev = &ep->pdev->dev;

	switch (err) {
	case -EACCES:
		this_cpu_inc(cpus->stats.failed_pins);
		dev_err_ratelimited(dev, "coiommu: map failed: the host did not pin a page\n");
		return -EIO;
	case -EBUSY:
		this_cpu_inc(cpus->stats.failed_counts);
		dev_warn_ratelimited(dev, "coiommu: map failed: a page is mapped too often\n");
		return -ENOMEM;
	case -EAGAIN:
		this_cpu_inc(cpus->stats.failed_tables);
		dev_warn_ratelimited(dev, "coiommu: map failed: no memory for a table\n");
		return -ENOMEM;
	case -ERANGE:
		this_cpu_inc(cpus->stats.failed_addresses);
		dev_err_ratelimited(dev, "coiommu: map failed: an address beyond the tables\n");
		return -EIO;
	default:
		this_cpu_inc(cpus->stats.failed_inactive);
		return -EIO;
	}
}

/**
 * coiommu_track_sg() - count the pages of a mapped list, and have them pinned
 * @ep: the endpoint that will use them
 * @sgl: the list, with DMA addresses
 * @nents: its entries
 *
 * In any context but NMI. May take as long as the host does, 5 s at most.
 *
 * Return: 0 if all of them are pinned and will be until coiommu_untrack_sg();
 * or -ENOMEM, or -EIO, and nothing is counted.
 */
int coiommu_track_sg(struct coiommu_endpoint *ep, struct scatterlist *sgl,
		     unsigned int nents)
{
	int err;

	do {
		err = try_track(ep, sgl, nents);
	} while (err == -EAGAIN &&
		 coiommu_dtt_top_up(&ep->c->dtt, GFP_ATOMIC | __GFP_NOWARN));

	return err ? map_failed(ep, err) : 0;
}

/**
 * coiommu_untrack_sg() - take back what coiommu_track_sg() counted
 * @ep: the endpoint
 * @sgl: the list, with the same DMA addresses
 * @nents: its entries
 */
void coiommu_untrack_sg(struct coiommu_endpoint *ep, struct scatterlist *sgl,
			unsigned int nents)
{
	this_cpu_inc(ep->c->cpus->stats.unmaps);
	uncount_sg(ep->c, sgl, nents, U64_MAX);
}

/**
 * coiommu_track() - count the pages of one buffer, and have them pinned
 * @ep: the endpoint that will use them
 * @addr: the buffer's DMA address
 * @len: its bytes
 *
 * Return: as coiommu_track_sg().
 */
int coiommu_track(struct coiommu_endpoint *ep, dma_addr_t addr, size_t len)
{
	struct scatterlist sg;

	if (len > UINT_MAX)
		return map_failed(ep, -ERANGE);
	sg_init_table(&sg, 1);
	sg_dma_address(&sg) = addr;
	sg_dma_len(&sg) = len;
	return coiommu_track_sg(ep, &sg, 1);
}

/**
 * coiommu_untrack() - take back what coiommu_track() counted
 * @ep: the endpoint
 * @addr: the buffer's DMA address
 * @len: its bytes
 */
void coiommu_untrack(struct coiommu_endpoint *ep, dma_addr_t addr, size_t len)
{
	this_cpu_inc(ep->c->cpus->stats.unmaps);
	uncount_pages(ep->c, addr, len, U64_MAX);
}
