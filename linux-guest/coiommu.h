/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The rooms of the driver:
 *
 * main.c      the PCI device: finds it, starts it, ends it
 * endpoint.c  the devices it speaks for: takes over their DMA ops in time
 * ops.c       the DMA ops: each map is delegated, then tracked
 * track.c     counts pages in the DTT, and asks for those not pinned
 * request.c   asks the host and waits
 * dtt.c       the tables
 * debugfs.c   counters
 */
#ifndef COIOMMU_H
#define COIOMMU_H

#include <linux/dma-map-ops.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/pci.h>
#include <linux/percpu.h>
#include <linux/scatterlist.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>

#include "abi.h"

enum coiommu_state {
	COIOMMU_STARTING,	/* endpoints are being taken over */
	COIOMMU_ACTIVE,
	COIOMMU_DEAD,		/* did not answer: the host may still write */
	COIOMMU_OFF,		/* deactivated by us */
};

/* Pages for tables, ready for callers that cannot wait for memory. */
#define COIOMMU_POOL_PAGES	64

struct coiommu_pool {
	raw_spinlock_t lock;
	unsigned int nr;
	void *pages[COIOMMU_POOL_PAGES];
	struct work_struct refill;
};

struct coiommu_dtt {
	u64 *root;
	unsigned int levels;
	atomic_t tables;
	struct coiommu_pool pool;
};

/* Counters of one CPU, written by it alone: interrupts off, or this_cpu_inc. */
struct coiommu_stats {
	u64 maps;		/* calls that mapped something */
	u64 unmaps;
	u64 pages;		/* page maps of those calls */
	u64 hits;		/* page maps that found the page pinned */
	u64 requests;
	u64 requested_pages;
	u64 failed_pins;	/* calls that failed: the host did not pin */
	u64 failed_counts;	/* ... a page was mapped too often */
	u64 failed_tables;	/* ... no memory for a table */
	u64 failed_addresses;	/* ... the tables do not reach so far */
	u64 failed_inactive;	/* ... the device is dead or off */
	u64 timeouts;
	u64 underflows;		/* pages unmapped that were not mapped */
	u64 longest_wait_ns;
};

struct coiommu_cpu {
	struct coiommu_batch *batch;	/* one page */
	struct coiommu_stats stats;
};

struct coiommu {
	struct pci_dev *pdev;
	int state;			/* enum coiommu_state */
	void __iomem *regs;
	void __iomem *slots;
	u32 count_limit;
	struct coiommu_dtt dtt;
	struct coiommu_cpu __percpu *cpus;

	struct notifier_block bus_nb;
	struct work_struct disconnect;
	struct dentry *debugfs;

	/* Guards which endpoints are taken over. Inside a device's lock. */
	struct mutex lock;
	unsigned int nr_endpoints;
	struct coiommu_endpoint *endpoints;	/* by BDF, ascending */
};

struct coiommu_endpoint {
	struct coiommu *c;
	u16 bdf;
	bool bound;		/* to a driver, through our ops */
	bool rebind;		/* to be bound again, once we are active */
	struct pci_dev *pdev;	/* while it is taken over */
	struct device *shadow;	/* while it is taken over */
	struct pci_dev *locked;	/* while we start */
	/* The device's dma_ops, a copy for each: leads from there to here. */
	const struct dma_map_ops ops;
};

static inline struct coiommu_endpoint *coiommu_endpoints_end(struct coiommu *c)
{
	return c->endpoints + c->nr_endpoints;
}

/* endpoint.c */
int coiommu_read_topology(struct coiommu *c, const void __iomem *topology,
			  resource_size_t size);
int coiommu_bus_notify(struct notifier_block *nb, unsigned long action,
		       void *data);
int coiommu_start(struct coiommu *c, bool rebind,
		  int (*activate)(struct coiommu *c));
bool coiommu_release_endpoints(struct coiommu *c);
void coiommu_disconnect(struct work_struct *work);

/* ops.c */
extern const struct dma_map_ops coiommu_dma_ops;
struct device *coiommu_create_shadow(struct device *dev);
void coiommu_refresh_shadow(struct coiommu_endpoint *ep, struct device *dev);

/* track.c */
int coiommu_track(struct coiommu_endpoint *ep, dma_addr_t addr, size_t len);
void coiommu_untrack(struct coiommu_endpoint *ep, dma_addr_t addr, size_t len);
int coiommu_track_sg(struct coiommu_endpoint *ep, struct scatterlist *sgl,
		     unsigned int nents);
void coiommu_untrack_sg(struct coiommu_endpoint *ep, struct scatterlist *sgl,
			unsigned int nents);

/* request.c */
int coiommu_request(struct coiommu *c, u64 request, unsigned int pages);

/* dtt.c */
int coiommu_dtt_init(struct coiommu_dtt *dtt, unsigned int levels);
void coiommu_dtt_free(struct coiommu_dtt *dtt);
void coiommu_dtt_stop_refill(struct coiommu_dtt *dtt);
bool coiommu_dtt_top_up(struct coiommu_dtt *dtt, gfp_t gfp);
u32 *coiommu_dtt_leaves(struct coiommu_dtt *dtt, u64 gfn, bool create);

/* debugfs.c */
void coiommu_debugfs_init(void);
void coiommu_debugfs_exit(void);
void coiommu_debugfs_add(struct coiommu *c);
void coiommu_debugfs_remove(struct coiommu *c);

#endif
