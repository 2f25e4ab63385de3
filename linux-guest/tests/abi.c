// SPDX-License-Identifier: GPL-2.0-only
/*
 * Checks abi.h in user space. The numbers are those that the host's crate for
 * the same tables (coiommu-dtt) gives.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define u16 uint16_t
#define u32 uint32_t
#define u64 uint64_t

#include "../abi.h"

static int failures;

static void check(const char *what, u64 got, u64 want)
{
	if (got == want)
		return;
	failures++;
	fprintf(stderr, "%s: got %#llx, want %#llx\n", what,
		(unsigned long long)got, (unsigned long long)want);
}

/* Where a page's entries are, from the root down. */
static void check_walk(unsigned int levels, u64 gfn, const unsigned int *path)
{
	unsigned int level;

	for (level = levels; level > 1; level--)
		check("directory index", coiommu_dir_index(gfn, level), *path++);
	check("leaf index", coiommu_leaf_index(gfn), *path);
}

#define CHECK_WALK(levels, gfn, ...) \
	check_walk(levels, gfn, (const unsigned int[]){ __VA_ARGS__ })

static void walks(void)
{
	CHECK_WALK(1, 0x3ff, 1023);
	CHECK_WALK(2, 0x400, 1, 0);
	CHECK_WALK(2, 0x7ffff, 511, 1023);
	CHECK_WALK(3, 0x80000, 1, 0, 0);
	CHECK_WALK(3, 0xfffffff, 511, 511, 1023);
	CHECK_WALK(4, 0x12345678, 1, 70, 277, 632);
	CHECK_WALK(4, 0x1fffffffff, 511, 511, 511, 1023);
	CHECK_WALK(5, 0x12345678, 0, 1, 70, 277, 632);
	CHECK_WALK(5, 0x2000000000, 1, 0, 0, 0, 0);
	CHECK_WALK(5, 0x2aaaaaaaaaaa, 341, 170, 341, 170, 682);
	CHECK_WALK(5, 0x3fffffffffff, 511, 511, 511, 511, 1023);
}

static void tree_heights(void)
{
	static const unsigned int bits[] = { 10, 19, 28, 37, 46 };
	unsigned int i;

	for (i = 0; i < 5; i++)
		check("gfn bits", coiommu_gfn_bits(i + 1), bits[i]);
	check("levels for 22 bits", coiommu_levels(22), 1);
	check("levels for 23 bits", coiommu_levels(23), 2);
	check("levels for 40 bits", coiommu_levels(40), 3);
	check("levels for 46 bits", coiommu_levels(46), 4);
	check("levels for 48 bits", coiommu_levels(48), 4);
	check("levels for 49 bits", coiommu_levels(49), 4);
	check("levels for 52 bits", coiommu_levels(52), 5);
}

static void pages(void)
{
	check("no bytes", coiommu_nr_pages(0x1234, 0), 0);
	check("a byte", coiommu_nr_pages(0x1fff, 1), 1);
	check("two bytes", coiommu_nr_pages(0x1fff, 2), 2);
	check("a page", coiommu_nr_pages(0x1000, 0x1000), 1);
	check("a page askew", coiommu_nr_pages(0x1001, 0x1000), 2);
	check("the last page", coiommu_nr_pages(-1ULL << 12, 0x1000), 1);
	check("gfn", coiommu_gfn(0x123456789), 0x123456);
}

static void leaves(void)
{
	u32 limit = coiommu_count_limit(4);
	u32 word = 0;

	check("limit of 1 CPU", coiommu_count_limit(1), 0xfffe);
	check("limit of 1024 CPUs", coiommu_count_limit(1024), 0xfbff);
	check("first map", coiommu_leaf_up(0, limit, &word), true);
	check("its word", word, 0x40000001);
	/* The host's bit and the reserved ones stay as they are. */
	check("map", coiommu_leaf_up(0xbfff0001, limit, &word), true);
	check("its word", word, 0xffff0002);
	check("highest map", coiommu_leaf_up(limit - 1, limit, &word), true);
	check("its word", word, COIOMMU_LEAF_ACCESSED | limit);
	check("one more", coiommu_leaf_up(word, limit, &word), false);
	check("unmap", coiommu_leaf_down(0xffff0002, &word), true);
	check("its word", word, 0xffff0001);
	check("last unmap", coiommu_leaf_down(0x40000001, &word), true);
	check("its word", word, 0x40000000);
	check("one more", coiommu_leaf_down(0xffff0000, &word), false);
}

static void requests(void)
{
	static const unsigned char want[] = {
		0x13, 0x01, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0,
		7, 0, 0, 0, 0, 0, 0, 0, 0x9a, 0x78, 0x56, 0x34, 0x12, 0, 0, 0,
	};
	u64 page[512] = { 0 };
	struct coiommu_batch *batch = (void *)page;

	check("page", coiommu_request_page(0x12345, 0x28), 0x123450028);
	check("page", coiommu_request_page(0xfffffffff, 0xffff),
	      0xfffffffffffff);
	check("batch", coiommu_request_batch(0x123456000), 0x8000000123456000);

	batch->bdf = 0x113;
	batch->nr_pages = 2;
	batch->gfns[0] = 7;
	batch->gfns[1] = 0x123456789a;
	check("batch's bytes", memcmp(page, want, sizeof(want)), 0);
	check("what fits", COIOMMU_BATCH_MAX, 510);
	check("and ends at", offsetof(struct coiommu_batch,
				      gfns[COIOMMU_BATCH_MAX]), 4096);
}

int main(void)
{
	walks();
	tree_heights();
	pages();
	leaves();
	requests();
	if (failures)
		fprintf(stderr, "%d checks failed\n", failures);
	return failures != 0;
}
