// SPDX-License-Identifier: GPL-2.0-only
/*
 * CoIOMMU: tells the host which pages the passed-through devices of this
 * guest use, so that only those need to be pinned.
 */
#include <linux/cc_platform.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "coiommu.h"

static bool rebind;
module_param(rebind, bool, 0444);
MODULE_PARM_DESC(rebind,
		 "unbind drivers that are bound to endpoints already, and bind them again (default: no, leave CoIOMMU off)");

/* Pages of per-CPU batches and of tables: what the host reads and writes. */
static void free_shared_memory(struct coiommu *c)
{
	unsigned int cpu;

	if (c->cpus)
		for_each_possible_cpu(cpu)
			free_page((unsigned long)
				  per_cpu_ptr(c->cpus, cpu)->batch);
	coiommu_dtt_free(&c->dtt);
}

/* With no endpoint taken over, so with no map under way. */
static void free_coiommu(struct coiommu *c, bool host_is_done)
{
	coiommu_dtt_stop_refill(&c->dtt);
	if (host_is_done)
		free_shared_memory(c);
	free_percpu(c->cpus);
	kvfree(c->endpoints);
	kfree(c);
}

static struct coiommu *alloc_coiommu(struct pci_dev *pdev)
{
	struct coiommu *c = kzalloc(sizeof(*c), GFP_KERNEL);
	unsigned int cpu;

	if (!c)
		return NULL;
	c->pdev = pdev;
	c->state = COIOMMU_STARTING;
	c->count_limit = coiommu_count_limit(num_possible_cpus());
	mutex_init(&c->lock);
	INIT_WORK(&c->disconnect, coiommu_disconnect);
	if (coiommu_dtt_init(&c->dtt, coiommu_levels(MAX_PHYSMEM_BITS)))
		goto err;
	c->cpus = alloc_percpu(struct coiommu_cpu);
	if (!c->cpus)
		goto err;
	for_each_possible_cpu(cpu) {
		void *page = (void *)get_zeroed_page(GFP_KERNEL);

		if (!page)
			goto err;
		per_cpu_ptr(c->cpus, cpu)->batch = page;
	}
	return c;
err:
	free_coiommu(c, true);
	return NULL;
}

static int map_bars(struct coiommu *c)
{
	struct pci_dev *pdev = c->pdev;
	resource_size_t regs = pci_resource_len(pdev, COIOMMU_BAR_REGS);
	resource_size_t slots = pci_resource_len(pdev, COIOMMU_BAR_SLOTS);

	if (regs < COIOMMU_REG_DOORBELLS + nr_cpu_ids ||
	    slots < nr_cpu_ids * sizeof(u64)) {
		dev_err(&pdev->dev, "its BARs are too small for %u CPUs\n",
			nr_cpu_ids);
		return -EINVAL;
	}
	c->regs = pci_iomap(pdev, COIOMMU_BAR_REGS, 0);
	c->slots = pci_iomap(pdev, COIOMMU_BAR_SLOTS, 0);
	return c->regs && c->slots ? 0 : -ENOMEM;
}

static void unmap_bars(struct coiommu *c)
{
	if (c->slots)
		pci_iounmap(c->pdev, c->slots);
	if (c->regs)
		pci_iounmap(c->pdev, c->regs);
}

static int read_topology(struct coiommu *c)
{
	resource_size_t size = pci_resource_len(c->pdev, COIOMMU_BAR_TOPOLOGY);
	void __iomem *topology;
	int err;

	if (size < sizeof(u16)) {
		dev_err(&c->pdev->dev, "has no topology map\n");
		return -EINVAL;
	}
	topology = pci_iomap(c->pdev, COIOMMU_BAR_TOPOLOGY, 0);
	if (!topology)
		return -ENOMEM;
	err = coiommu_read_topology(c, topology, size);
	pci_iounmap(c->pdev, topology);
	return err;
}

/* Returns whether the command has taken effect. */
static bool send_command(struct coiommu *c, u64 command)
{
	writeq(command, c->regs + COIOMMU_REG_COMMAND);
	return readq(c->regs + COIOMMU_REG_COMMAND) == 0;
}

static int activate(struct coiommu *c)
{
	u64 root = virt_to_phys(c->dtt.root);
	unsigned int cpu;

	/* A kernel before this one may have died in the middle of a request. */
	for (cpu = 0; cpu < nr_cpu_ids; cpu++)
		writeq(0, c->slots + cpu * sizeof(u64));
	writeq(root, c->regs + COIOMMU_REG_ROOT);
	writeq(c->dtt.levels, c->regs + COIOMMU_REG_LEVELS);
	if (readq(c->regs + COIOMMU_REG_ROOT) != root ||
	    readq(c->regs + COIOMMU_REG_LEVELS) != c->dtt.levels ||
	    !send_command(c, COIOMMU_ACTIVATE)) {
		dev_err(&c->pdev->dev, "does not take commands: is its server running?\n");
		return -EIO;
	}
	WRITE_ONCE(c->state, COIOMMU_ACTIVE);
	return 0;
}

/*
 * Returns whether the host is done with our memory. A device that was dead
 * before may come back to it at any time.
 */
static bool deactivate(struct coiommu *c)
{
	int old = cmpxchg(&c->state, COIOMMU_ACTIVE, COIOMMU_OFF);

	/* Requests are made with interrupts off: none is under way after. */
	synchronize_rcu();
	if (old != COIOMMU_ACTIVE)
		return old == COIOMMU_OFF;
	return send_command(c, COIOMMU_DEACTIVATE);
}

static int coiommu_check(struct pci_dev *pdev)
{
	if (pdev->revision != COIOMMU_REVISION) {
		dev_err(&pdev->dev, "is of revision %#x; this driver is for revision %#x\n",
			pdev->revision, COIOMMU_REVISION);
		return -ENODEV;
	}
	if (cc_platform_has(CC_ATTR_MEM_ENCRYPT)) {
		dev_err(&pdev->dev, "cannot be used by a guest with encrypted memory\n");
		return -ENODEV;
	}
	return 0;
}

/* A wrong address in the host's list looks like this. */
static void tell_absent(struct coiommu *c)
{
	struct coiommu_endpoint *ep;

	mutex_lock(&c->lock);
	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++)
		if (!ep->pdev)
			dev_warn(&c->pdev->dev, "endpoint %02x:%02x.%x is not there (yet)\n",
				 PCI_BUS_NUM(ep->bdf), PCI_SLOT(ep->bdf),
				 PCI_FUNC(ep->bdf));
	mutex_unlock(&c->lock);
}

static int coiommu_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct coiommu *c;
	int err;

	BUILD_BUG_ON(PAGE_SHIFT != COIOMMU_PAGE_SHIFT);

	err = coiommu_check(pdev);
	if (err)
		return err;
	c = alloc_coiommu(pdev);
	if (!c)
		return -ENOMEM;
	err = pci_enable_device_mem(pdev);
	if (err)
		goto err_free;
	err = pci_request_regions(pdev, KBUILD_MODNAME);
	if (err)
		goto err_disable;
	err = map_bars(c);
	if (err)
		goto err_unmap;
	err = read_topology(c);
	if (err)
		goto err_unmap;

	c->bus_nb.notifier_call = coiommu_bus_notify;
	err = bus_register_notifier(&pci_bus_type, &c->bus_nb);
	if (err)
		goto err_unmap;
	coiommu_debugfs_add(c);
	pci_set_drvdata(pdev, c);
	err = coiommu_start(c, rebind, activate);
	if (err)
		goto err_notifier;
	dev_info(&pdev->dev, "active: %u endpoints, %u levels of tables\n",
		 c->nr_endpoints, c->dtt.levels);
	tell_absent(c);
	return 0;

err_notifier:
	if (err == -EBUSY)
		dev_err(&pdev->dev,
			"not activated: load coiommu before the endpoints' drivers, or with rebind=1\n");
	coiommu_debugfs_remove(c);
	bus_unregister_notifier(&pci_bus_type, &c->bus_nb);
err_unmap:
	unmap_bars(c);
	pci_release_regions(pdev);
err_disable:
	pci_disable_device(pdev);
err_free:
	free_coiommu(c, true);
	return err;
}

static void coiommu_remove(struct pci_dev *pdev)
{
	struct coiommu *c = pci_get_drvdata(pdev);
	bool unused, host_is_done;

	/* It unbinds drivers, which the notifier is to see. */
	cancel_work_sync(&c->disconnect);
	bus_unregister_notifier(&pci_bus_type, &c->bus_nb);
	coiommu_debugfs_remove(c);
	unused = coiommu_release_endpoints(c);
	host_is_done = deactivate(c);
	unmap_bars(c);
	pci_release_regions(pdev);
	pci_disable_device(pdev);
	if (!unused || !host_is_done)
		dev_warn(&pdev->dev, "its tables stay in memory: %s may still use them\n",
			 unused ? "the host" : "an endpoint's driver");
	if (unused)
		free_coiommu(c, host_is_done);
}

/* The endpoints have been shut down before: the device links see to that. */
static void coiommu_shutdown(struct pci_dev *pdev)
{
	deactivate(pci_get_drvdata(pdev));
}

/* The host knows nothing of a guest that sleeps or comes back from disk. */
static int coiommu_prepare(struct device *dev)
{
	dev_err(dev, "a guest with CoIOMMU cannot be suspended\n");
	return -EBUSY;
}

static const struct dev_pm_ops coiommu_pm_ops = {
	.prepare = coiommu_prepare,
};

static const struct pci_device_id coiommu_ids[] = {
	{ PCI_DEVICE(COIOMMU_VENDOR_ID, COIOMMU_DEVICE_ID) },
	{ }
};
MODULE_DEVICE_TABLE(pci, coiommu_ids);

static struct pci_driver coiommu_driver = {
	.name		= KBUILD_MODNAME,
	.id_table	= coiommu_ids,
	.probe		= coiommu_probe,
	.remove		= coiommu_remove,
	.shutdown	= coiommu_shutdown,
	.driver		= {
		.pm			= &coiommu_pm_ops,
		/* It must not go while endpoints use it. */
		.suppress_bind_attrs	= true,
		/* The drivers that wait for this module wait for its probe. */
		.probe_type		= PROBE_FORCE_SYNCHRONOUS,
	},
};

static int __init coiommu_init(void)
{
	struct pci_dev *pdev;
	int err;

	coiommu_debugfs_init();
	err = pci_register_driver(&coiommu_driver);
	if (err) {
		coiommu_debugfs_exit();
		return err;
	}
	pdev = pci_get_device(COIOMMU_VENDOR_ID, COIOMMU_DEVICE_ID, NULL);
	if (!pdev)
		pr_info("coiommu: this machine has no CoIOMMU device (yet)\n");
	pci_dev_put(pdev);
	return 0;
}
module_init(coiommu_init);

static void __exit coiommu_exit(void)
{
	pci_unregister_driver(&coiommu_driver);
	coiommu_debugfs_exit();
}
module_exit(coiommu_exit);

MODULE_DESCRIPTION("CoIOMMU guest driver");
MODULE_AUTHOR("The CoIOMMU developers");
MODULE_VERSION("0.1.0");
MODULE_LICENSE("GPL");
