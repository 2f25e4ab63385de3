// SPDX-License-Identifier: GPL-2.0-only
/*
 * The endpoints: the devices that the host names, whose DMA we track.
 *
 * An endpoint is taken over (gets our DMA ops) while no driver is bound to
 * it, and stays so until it or the CoIOMMU device goes. While a driver is
 * bound, it holds this module, and a device link tells the kernel that the
 * endpoint needs the CoIOMMU device: it is shut down before, and its driver
 * unbound before.
 */
#include <linux/bsearch.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/sort.h>

#include "compat.h"
#include "coiommu.h"

/* How often others may bind an endpoint that rebind=1 has just unbound. */
#define REBIND_TRIES	3

static int compare_endpoints(const void *a, const void *b)
{
	const struct coiommu_endpoint *left = a, *right = b;

	return (int)left->bdf - (int)right->bdf;
}

/**
 * coiommu_read_topology() - learn which devices the endpoints are
 * @c: the device, without endpoints
 * @topology: the topology map
 * @size: its bytes
 *
 * Return: 0, -ENODEV if there is none, or another error.
 */
int coiommu_read_topology(struct coiommu *c, const void __iomem *topology,
			  resource_size_t size)
{
	struct device *dev = &c->pdev->dev;
	struct coiommu_endpoint *ep;
	unsigned int i, count;

	count = readw(topology);
	if (count > size / sizeof(u16) - 1) {
		dev_err(dev, "lists %u endpoints, more than its BAR holds\n",
			count);
		return -EINVAL;
	}
	c->endpoints = kvcalloc(count, sizeof(*c->endpoints), GFP_KERNEL);
	if (!c->endpoints && count)
		return -ENOMEM;
	for (i = 0; i < count; i++) {
		u16 bdf = readw(topology + (i + 1) * sizeof(u16));

		/* 0 is no endpoint's: a gap. */
		if (bdf && bdf != pci_dev_id(c->pdev))
			c->endpoints[c->nr_endpoints++].bdf = bdf;
	}
	if (!c->nr_endpoints) {
		dev_warn(dev, "lists no endpoints: there is nothing to do\n");
		return -ENODEV;
	}

	sort(c->endpoints, c->nr_endpoints, sizeof(*c->endpoints),
	     compare_endpoints, NULL);
	for (i = 0, count = 0; i < c->nr_endpoints; i++)
		if (!count || c->endpoints[i].bdf != c->endpoints[count - 1].bdf)
			c->endpoints[count++].bdf = c->endpoints[i].bdf;
	c->nr_endpoints = count;
	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++) {
		ep->c = c;
		memcpy((void *)&ep->ops, &coiommu_dma_ops, sizeof(ep->ops));
	}
	return 0;
}

/* A BDF is one of the PCI domain that the CoIOMMU device is in. */
static struct pci_dev *get_endpoint_device(struct coiommu_endpoint *ep)
{
	return pci_get_domain_bus_and_slot(pci_domain_nr(ep->c->pdev->bus),
					   PCI_BUS_NUM(ep->bdf),
					   ep->bdf & 0xff);
}

static int compare_bdf(const void *key, const void *elt)
{
	const struct coiommu_endpoint *ep = elt;
	const u16 *bdf = key;

	return (int)*bdf - (int)ep->bdf;
}

static struct coiommu_endpoint *find_endpoint(struct coiommu *c,
					      struct pci_dev *pdev)
{
	u16 bdf = pci_dev_id(pdev);

	if (pci_domain_nr(pdev->bus) != pci_domain_nr(c->pdev->bus))
		return NULL;
	return bsearch(&bdf, c->endpoints, c->nr_endpoints,
		       sizeof(*c->endpoints), compare_bdf);
}

/* With the endpoint's lock held or the endpoint gone, and no driver. */
static void give_back_endpoint(struct coiommu_endpoint *ep)
{
	lockdep_assert_held(&ep->c->lock);
	if (!ep->shadow)
		return;
	set_dma_ops(&ep->pdev->dev, NULL);
	put_device(ep->shadow);
	ep->shadow = NULL;
	pci_dev_put(ep->pdev);
	ep->pdev = NULL;
}

/* With the endpoint's lock held, and no driver that has mapped anything. */
static int take_endpoint(struct coiommu_endpoint *ep, struct pci_dev *pdev)
{
	struct device *dev = &pdev->dev;

	lockdep_assert_held(&ep->c->lock);
	if (use_dma_iommu(dev) ||
	    (get_dma_ops(dev) && get_dma_ops(dev) != &ep->ops)) {
		dev_err(dev, "coiommu: has DMA ops already: is it behind an IOMMU of the guest?\n");
		return -EOPNOTSUPP;
	}
	if (!dev->dma_mask || dev->dma_range_map) {
		dev_err(dev, "coiommu: its DMA addresses are not physical addresses\n");
		return -EOPNOTSUPP;
	}
	if (ep->pdev != pdev) {
		give_back_endpoint(ep);
		ep->shadow = coiommu_create_shadow(dev);
		if (!ep->shadow)
			return -ENOMEM;
		ep->pdev = pci_dev_get(pdev);
		/* Firmware may have left its DMA running. */
		pci_clear_master(pdev);
	}
	coiommu_refresh_shadow(ep, dev);
	set_dma_ops(dev, &ep->ops);
	/* A driver before may have found that there is nothing to sync. */
	dma_reset_need_sync(dev);
	return 0;
}

/* Takes it for a driver, which will use our ops: without us, it must not. */
static int hold_endpoint(struct coiommu_endpoint *ep, struct pci_dev *pdev)
{
	int err = take_endpoint(ep, pdev);

	if (err || ep->bound)
		return err;
	if (!try_module_get(THIS_MODULE)) {
		give_back_endpoint(ep);
		return -ENODEV;
	}
	ep->bound = true;
	return 0;
}

/* A driver is about to be bound: its probe function comes next. */
static void endpoint_binds(struct coiommu_endpoint *ep, struct pci_dev *pdev)
{
	struct coiommu *c = ep->c;
	int err;

	if (READ_ONCE(c->state) == COIOMMU_STARTING) {
		dev_warn(&pdev->dev, "coiommu: gets a driver before coiommu is ready\n");
		return;
	}
	mutex_lock(&c->lock);
	err = hold_endpoint(ep, pdev);
	mutex_unlock(&c->lock);
	if (err)
		dev_err(&pdev->dev, "coiommu: not tracked: its DMA will fail\n");
	else if (!device_link_add(&pdev->dev, &c->pdev->dev,
				  DL_FLAG_AUTOREMOVE_CONSUMER))
		dev_warn(&pdev->dev, "coiommu: no device link: may be shut down in the wrong order\n");
}

static void endpoint_is_unbound(struct coiommu_endpoint *ep)
{
	mutex_lock(&ep->c->lock);
	if (ep->bound) {
		ep->bound = false;
		module_put(THIS_MODULE);
	}
	mutex_unlock(&ep->c->lock);
}

static void endpoint_is_gone(struct coiommu_endpoint *ep, struct pci_dev *pdev)
{
	mutex_lock(&ep->c->lock);
	if (ep->pdev == pdev)
		give_back_endpoint(ep);
	mutex_unlock(&ep->c->lock);
}

/* What happens to the devices of the PCI bus: see struct notifier_block. */
int coiommu_bus_notify(struct notifier_block *nb, unsigned long action,
		       void *data)
{
	struct coiommu *c = container_of(nb, struct coiommu, bus_nb);
	struct pci_dev *pdev = to_pci_dev(data);
	struct coiommu_endpoint *ep = find_endpoint(c, pdev);

	if (!ep)
		return NOTIFY_DONE;
	switch (action) {
	case BUS_NOTIFY_BIND_DRIVER:
		endpoint_binds(ep, pdev);
		return NOTIFY_OK;
	case BUS_NOTIFY_DRIVER_NOT_BOUND:
	case BUS_NOTIFY_UNBOUND_DRIVER:
		endpoint_is_unbound(ep);
		return NOTIFY_OK;
	case BUS_NOTIFY_REMOVED_DEVICE:
		endpoint_is_gone(ep, pdev);
		return NOTIFY_OK;
	default:
		return NOTIFY_DONE;
	}
}

/*
 * While they are locked, no driver is bound to an endpoint and none unbound.
 * The order is that of their BDFs, as for all who lock the devices of a bus.
 */
static void lock_endpoints(struct coiommu *c)
{
	struct coiommu_endpoint *ep;

	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++) {
		ep->locked = get_endpoint_device(ep);
		if (ep->locked)
			device_lock(&ep->locked->dev);
	}
}

static void unlock_endpoints(struct coiommu *c)
{
	struct coiommu_endpoint *ep;

	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++) {
		if (!ep->locked)
			continue;
		device_unlock(&ep->locked->dev);
		pci_dev_put(ep->locked);
		ep->locked = NULL;
	}
}

/* Whether drivers are bound that may have mapped what we did not see. */
static bool find_untracked(struct coiommu *c, bool rebind)
{
	struct coiommu_endpoint *ep;
	bool found = false;

	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++) {
		if (!ep->locked || !ep->locked->dev.driver)
			continue;
		found = true;
		ep->rebind = rebind;
		dev_warn(&ep->locked->dev,
			 "coiommu: %s is bound already, its DMA is not tracked%s\n",
			 ep->locked->dev.driver->name,
			 rebind ? ": unbinding it" : "");
	}
	return found;
}

static int take_endpoints(struct coiommu *c)
{
	struct coiommu_endpoint *ep;
	int err = 0;

	mutex_lock(&c->lock);
	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++)
		if (ep->locked && !err)
			err = take_endpoint(ep, ep->locked);
	mutex_unlock(&c->lock);
	return err;
}

static void give_back_endpoints(struct coiommu *c)
{
	struct coiommu_endpoint *ep;

	mutex_lock(&c->lock);
	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++)
		give_back_endpoint(ep);
	mutex_unlock(&c->lock);
}

static void unbind_untracked(struct coiommu *c)
{
	struct coiommu_endpoint *ep;

	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++) {
		struct pci_dev *pdev;

		if (!ep->rebind)
			continue;
		pdev = get_endpoint_device(ep);
		if (pdev)
			device_release_driver(&pdev->dev);
		pci_dev_put(pdev);
	}
}

static void rebind_unbound(struct coiommu *c)
{
	struct coiommu_endpoint *ep;

	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++) {
		struct pci_dev *pdev;

		if (!ep->rebind)
			continue;
		ep->rebind = false;
		pdev = get_endpoint_device(ep);
		if (pdev && device_attach(&pdev->dev) <= 0)
			dev_warn(&pdev->dev, "coiommu: has no driver any more\n");
		pci_dev_put(pdev);
	}
}

/**
 * coiommu_start() - take over the endpoints, and activate
 * @c: the device, whose notifier is registered
 * @rebind: whether to unbind drivers that are bound already, and bind them
 *	again afterwards
 * @activate: makes the device active, and says so in its state
 *
 * Nothing is bound to an endpoint from when we looked until it is active.
 *
 * Return: 0, -EBUSY if drivers are bound already, or another error; then no
 * endpoint is taken over.
 */
int coiommu_start(struct coiommu *c, bool rebind,
		  int (*activate)(struct coiommu *c))
{
	unsigned int tries = rebind ? REBIND_TRIES : 0;
	int err;

	lock_endpoints(c);
	while (find_untracked(c, tries)) {
		unlock_endpoints(c);
		if (!tries--) {
			err = -EBUSY;
			goto out;
		}
		unbind_untracked(c);
		lock_endpoints(c);
	}
	err = take_endpoints(c);
	if (!err)
		err = activate(c);
	if (err)
		give_back_endpoints(c);
	unlock_endpoints(c);
out:
	rebind_unbound(c);
	return err;
}

/**
 * coiommu_release_endpoints() - give back the endpoints
 * @c: the device, whose notifier is no longer registered
 *
 * Return: whether all of them are; false if a driver still uses our ops.
 */
bool coiommu_release_endpoints(struct coiommu *c)
{
	struct coiommu_endpoint *ep;
	bool all = true;

	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++) {
		struct pci_dev *pdev = pci_dev_get(ep->pdev);

		if (!pdev)
			continue;
		device_lock(&pdev->dev);
		mutex_lock(&c->lock);
		if (ep->bound)
			all = false;
		else
			give_back_endpoint(ep);
		mutex_unlock(&c->lock);
		device_unlock(&pdev->dev);
		pci_dev_put(pdev);
	}
	return all;
}

static struct pci_dev *get_bound(struct coiommu_endpoint *ep)
{
	struct pci_dev *pdev;

	mutex_lock(&ep->c->lock);
	pdev = ep->bound ? pci_dev_get(ep->pdev) : NULL;
	mutex_unlock(&ep->c->lock);
	return pdev;
}

/**
 * coiommu_disconnect() - treat the endpoints as if they were unplugged
 * @work: the device's work
 *
 * For a device that is dead. Drivers take a map that fails for a shortage
 * that passes, and some try again for ever: only when their device is gone do
 * they let go of what was asked of them, with errors.
 */
void coiommu_disconnect(struct work_struct *work)
{
	struct coiommu *c = container_of(work, struct coiommu, disconnect);
	struct coiommu_endpoint *ep;
	struct pci_dev *pdev;

	/* First all of them, as unbinding can take long. */
	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++) {
		pdev = get_bound(ep);
		if (!pdev)
			continue;
		dev_err(&pdev->dev, "coiommu: disconnected\n");
		pci_clear_master(pdev);
		xchg(&pdev->error_state, pci_channel_io_perm_failure);
		pci_dev_put(pdev);
	}
	for (ep = c->endpoints; ep < coiommu_endpoints_end(c); ep++) {
		pdev = get_bound(ep);
		if (pdev)
			device_release_driver(&pdev->dev);
		pci_dev_put(pdev);
	}
}
