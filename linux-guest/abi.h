/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What guest and device share, bit by bit. Only layout and arithmetic: this
 * file compiles in user space too, where tests/abi.c checks it.
 *
 * All of it is little-endian. A gfn is a guest physical address >> 12.
 */
#ifndef COIOMMU_ABI_H
#define COIOMMU_ABI_H

#include <linux/types.h>

/* The PCI device. */
#define COIOMMU_VENDOR_ID	0x1234
#define COIOMMU_DEVICE_ID	0xabcd
#define COIOMMU_REVISION	0x10

#define COIOMMU_BAR_REGS	0
#define COIOMMU_BAR_SLOTS	2	/* one u64 for each CPU */
#define COIOMMU_BAR_TOPOLOGY	4	/* u16 count, then count u16 BDFs */

/* Registers. A read of the command completes after the command took effect. */
#define COIOMMU_REG_ROOT	0x00
#define COIOMMU_REG_COMMAND	0x08
#define COIOMMU_REG_LEVELS	0x10
#define COIOMMU_REG_DOORBELLS	0x18	/* one byte for each CPU */

#define COIOMMU_DEACTIVATE	0
#define COIOMMU_ACTIVATE	1

/*
 * The DTT: a radix tree of 4 KiB tables, indexed by gfn. Level 1 tables hold
 * 1024 leaf words of 32 bits, those above 512 entries of 64 bits.
 */
#define COIOMMU_PAGE_SHIFT	12
#define COIOMMU_LEAF_BITS	10
#define COIOMMU_DIR_BITS	9
#define COIOMMU_MAX_LEVELS	5

#define COIOMMU_DIR_PRESENT	0x1ULL
#define COIOMMU_DIR_ADDR	0x000ffffffffff000ULL

#define COIOMMU_LEAF_PINNED	0x80000000U	/* the host's */
#define COIOMMU_LEAF_ACCESSED	0x40000000U	/* set by us, aged by the host */
#define COIOMMU_LEAF_COUNT	0xffffU		/* ours: maps of the page */

/* Requests. */
#define COIOMMU_REQUEST_BATCH	0x8000000000000000ULL

struct coiommu_batch {
	__le16 bdf;
	__le16 pad[3];
	__le64 nr_pages;
	__le64 gfns[];
};

/* As many as fit into one page, which is physically contiguous by nature. */
#define COIOMMU_BATCH_MAX	((4096 - sizeof(struct coiommu_batch)) / 8)

static inline u64 coiommu_gfn(u64 dma_addr)
{
	return dma_addr >> COIOMMU_PAGE_SHIFT;
}

/* How many pages a buffer touches. It must not wrap around. */
static inline u64 coiommu_nr_pages(u64 dma_addr, u64 len)
{
	if (!len)
		return 0;
	return coiommu_gfn(dma_addr + len - 1) - coiommu_gfn(dma_addr) + 1;
}

/* How many bits of a gfn a tree of so many levels tells apart. */
static inline unsigned int coiommu_gfn_bits(unsigned int levels)
{
	return COIOMMU_LEAF_BITS + COIOMMU_DIR_BITS * (levels - 1);
}

/* How many levels it takes to tell physical addresses of so many bits apart. */
static inline unsigned int coiommu_levels(unsigned int phys_bits)
{
	unsigned int levels = 1;

	while (levels < COIOMMU_MAX_LEVELS &&
	       coiommu_gfn_bits(levels) + COIOMMU_PAGE_SHIFT < phys_bits)
		levels++;
	return levels;
}

static inline unsigned int coiommu_leaf_index(u64 gfn)
{
	return gfn & ((1U << COIOMMU_LEAF_BITS) - 1);
}

/* For directories: level >= 2. */
static inline unsigned int coiommu_dir_index(u64 gfn, unsigned int level)
{
	return (gfn >> coiommu_gfn_bits(level - 1)) &
	       ((1U << COIOMMU_DIR_BITS) - 1);
}

/* The highest count: each CPU may be in the middle of one more map. */
static inline u32 coiommu_count_limit(unsigned int possible_cpus)
{
	return COIOMMU_LEAF_COUNT - possible_cpus;
}

/* A leaf word after one more map; false if the count is as high as it goes. */
static inline bool coiommu_leaf_up(u32 old, u32 limit, u32 *new)
{
	if ((old & COIOMMU_LEAF_COUNT) >= limit)
		return false;
	*new = (old + 1) | COIOMMU_LEAF_ACCESSED;
	return true;
}

/* A leaf word after one map less; false if there was none. */
static inline bool coiommu_leaf_down(u32 old, u32 *new)
{
	if (!(old & COIOMMU_LEAF_COUNT))
		return false;
	*new = old - 1;
	return true;
}

static inline u64 coiommu_request_page(u64 gfn, u16 bdf)
{
	return gfn << 16 | bdf;
}

static inline u64 coiommu_request_batch(u64 phys)
{
	return phys | COIOMMU_REQUEST_BATCH;
}

#endif
