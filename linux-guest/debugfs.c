// SPDX-License-Identifier: GPL-2.0-only
/* What can be looked at: a folder of debugfs for each CoIOMMU device. */
#include <linux/debugfs.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/seq_file.h>

#include "coiommu.h"

static struct dentry *root;

static const char *state_name(int state)
{
	switch (state) {
	case COIOMMU_STARTING:
		return "starting";
	case COIOMMU_ACTIVE:
		return "active";
	case COIOMMU_DEAD:
		return "dead";
	default:
		return "off";
	}
}

static void add_up(struct coiommu *c, struct coiommu_stats *sum)
{
	unsigned int cpu;

	memset(sum, 0, sizeof(*sum));
	for_each_possible_cpu(cpu) {
		const struct coiommu_stats *one =
			&per_cpu_ptr(c->cpus, cpu)->stats;

		sum->maps += READ_ONCE(one->maps);
		sum->unmaps += READ_ONCE(one->unmaps);
		sum->pages += READ_ONCE(one->pages);
		sum->hits += READ_ONCE(one->hits);
		sum->requests += READ_ONCE(one->requests);
		sum->requested_pages += READ_ONCE(one->requested_pages);
		sum->failed_pins += READ_ONCE(one->failed_pins);
		sum->failed_counts += READ_ONCE(one->failed_counts);
		sum->failed_tables += READ_ONCE(one->failed_tables);
		sum->failed_addresses += READ_ONCE(one->failed_addresses);
		sum->failed_inactive += READ_ONCE(one->failed_inactive);
		sum->timeouts += READ_ONCE(one->timeouts);
		sum->underflows += READ_ONCE(one->underflows);
		sum->longest_wait_ns = max(sum->longest_wait_ns,
					   READ_ONCE(one->longest_wait_ns));
	}
}

static int stats_show(struct seq_file *file, void *unused)
{
	struct coiommu *c = file->private;
	struct coiommu_stats sum;

	add_up(c, &sum);
	seq_printf(file, "state %s\n", state_name(READ_ONCE(c->state)));
	seq_printf(file, "levels %u\n", c->dtt.levels);
	seq_printf(file, "root %#llx\n", (u64)virt_to_phys(c->dtt.root));
	seq_printf(file, "tables %d\n", atomic_read(&c->dtt.tables));
	seq_printf(file, "pool %u\n", READ_ONCE(c->dtt.pool.nr));
	seq_printf(file, "maps %llu\n", sum.maps);
	seq_printf(file, "unmaps %llu\n", sum.unmaps);
	seq_printf(file, "pages %llu\n", sum.pages);
	seq_printf(file, "hits %llu\n", sum.hits);
	seq_printf(file, "requests %llu\n", sum.requests);
	seq_printf(file, "requested_pages %llu\n", sum.requested_pages);
	seq_printf(file, "failures %llu\n",
		   sum.failed_pins + sum.failed_counts + sum.failed_tables +
		   sum.failed_addresses + sum.failed_inactive);
	seq_printf(file, "failed_pins %llu\n", sum.failed_pins);
	seq_printf(file, "failed_counts %llu\n", sum.failed_counts);
	seq_printf(file, "failed_tables %llu\n", sum.failed_tables);
	seq_printf(file, "failed_addresses %llu\n", sum.failed_addresses);
	seq_printf(file, "failed_inactive %llu\n", sum.failed_inactive);
	seq_printf(file, "timeouts %llu\n", sum.timeouts);
	seq_printf(file, "underflows %llu\n", sum.underflows);
	seq_printf(file, "longest_wait_ns %llu\n", sum.longest_wait_ns);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(stats);

static const char *endpoint_state(const struct coiommu_endpoint *ep)
{
	if (ep->bound)
		return "bound";
	return ep->pdev ? "unbound" : "absent";
}

static int endpoints_show(struct seq_file *file, void *unused)
{
	struct coiommu *c = file->private;
	struct coiommu_endpoint *ep;

	mutex_lock(&c->lock);
	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++)
		seq_printf(file, "%04x:%02x:%02x.%x %s\n",
			   pci_domain_nr(c->pdev->bus), PCI_BUS_NUM(ep->bdf),
			   PCI_SLOT(ep->bdf), PCI_FUNC(ep->bdf),
			   endpoint_state(ep));
	mutex_unlock(&c->lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(endpoints);

void coiommu_debugfs_add(struct coiommu *c)
{
	c->debugfs = debugfs_create_dir(pci_name(c->pdev), root);
	debugfs_create_file("stats", 0444, c->debugfs, c, &stats_fops);
	debugfs_create_file("endpoints", 0444, c->debugfs, c, &endpoints_fops);
}

void coiommu_debugfs_remove(struct coiommu *c)
{
	debugfs_remove_recursive(c->debugfs);
}

void coiommu_debugfs_init(void)
{
	root = debugfs_create_dir(KBUILD_MODNAME, NULL);
}

void coiommu_debugfs_exit(void)
{
	debugfs_remove_recursive(root);
}
