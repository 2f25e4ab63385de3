// SPDX-License-Identifier: GPL-2.0-only
/*
 * The DMA ops of an endpoint.
 *
 * Each op is delegated to the DMA API on a shadow, a device that has the
 * endpoint's limits and no ops of its own. So all is done as the kernel does
 * it for a device without an IOMMU, bounce buffers included, and the address
 * that comes back is the one that the endpoint will use: that one is tracked.
 *
 * Mapping: the delegate first, then track; the caller gets the address only
 * when the host has pinned it. Unmapping: the delegate first, then untrack.
 */
#include <linux/memremap.h>
#include <linux/slab.h>

#include "compat.h"
#include "coiommu.h"

static struct coiommu_endpoint *endpoint_of(struct device *dev)
{
	return container_of(get_dma_ops(dev), struct coiommu_endpoint, ops);
}

static struct device *shadow_of(struct device *dev)
{
	return endpoint_of(dev)->shadow;
}

static void release_shadow(struct device *shadow)
{
	kfree(shadow);
}

/* The limits that a driver may change are shared, or copied when needed. */
struct device *coiommu_create_shadow(struct device *dev)
{
	struct device *shadow = kzalloc(sizeof(*shadow), GFP_KERNEL);

	if (!shadow)
		return NULL;
	device_initialize(shadow);
	shadow->release = release_shadow;
	if (dev_set_name(shadow, "coiommu-%s", dev_name(dev))) {
		put_device(shadow);
		return NULL;
	}
	shadow->dma_mask = dev->dma_mask;
	shadow->dma_parms = dev->dma_parms;
	set_dev_node(shadow, dev_to_node(dev));
	return shadow;
}

void coiommu_refresh_shadow(struct coiommu_endpoint *ep, struct device *dev)
{
	WRITE_ONCE(ep->shadow->coherent_dma_mask, dev->coherent_dma_mask);
	WRITE_ONCE(ep->shadow->bus_dma_limit, dev->bus_dma_limit);
}

static void *coiommu_alloc(struct device *dev, size_t size, dma_addr_t *handle,
			   gfp_t gfp, unsigned long attrs)
{
	struct coiommu_endpoint *ep = endpoint_of(dev);
	void *vaddr;

	coiommu_refresh_shadow(ep, dev);
	vaddr = dma_alloc_attrs(ep->shadow, size, handle, gfp, attrs);
	if (vaddr && coiommu_track(ep, *handle, size)) {
		dma_free_attrs(ep->shadow, size, vaddr, *handle, attrs);
		return NULL;
	}
	return vaddr;
}

static void coiommu_free(struct device *dev, size_t size, void *vaddr,
			 dma_addr_t handle, unsigned long attrs)
{
	struct coiommu_endpoint *ep = endpoint_of(dev);

	dma_free_attrs(ep->shadow, size, vaddr, handle, attrs);
	coiommu_untrack(ep, handle, size);
}

static struct page *coiommu_alloc_pages(struct device *dev, size_t size,
					dma_addr_t *handle,
					enum dma_data_direction dir, gfp_t gfp)
{
	struct coiommu_endpoint *ep = endpoint_of(dev);
	struct page *page;

	coiommu_refresh_shadow(ep, dev);
	page = dma_alloc_pages(ep->shadow, size, handle, dir, gfp);
	if (page && coiommu_track(ep, *handle, size)) {
		dma_free_pages(ep->shadow, size, page, *handle, dir);
		return NULL;
	}
	return page;
}

static void coiommu_free_pages(struct device *dev, size_t size,
			       struct page *page, dma_addr_t handle,
			       enum dma_data_direction dir)
{
	struct coiommu_endpoint *ep = endpoint_of(dev);

	dma_free_pages(ep->shadow, size, page, handle, dir);
	coiommu_untrack(ep, handle, size);
}

static int coiommu_mmap(struct device *dev, struct vm_area_struct *vma,
			void *vaddr, dma_addr_t handle, size_t size,
			unsigned long attrs)
{
	return dma_mmap_attrs(shadow_of(dev), vma, vaddr, handle, size, attrs);
}

static int coiommu_get_sgtable(struct device *dev, struct sg_table *sgt,
			       void *vaddr, dma_addr_t handle, size_t size,
			       unsigned long attrs)
{
	return dma_get_sgtable_attrs(shadow_of(dev), sgt, vaddr, handle, size,
				     attrs);
}

#ifdef COIOMMU_MAP_PHYS
static dma_addr_t coiommu_map_phys(struct device *dev, phys_addr_t phys,
				   size_t size, enum dma_data_direction dir,
				   unsigned long attrs)
{
	struct coiommu_endpoint *ep = endpoint_of(dev);
	dma_addr_t addr = dma_map_phys(ep->shadow, phys, size, dir, attrs);

	/* MMIO is no memory: there is nothing to pin. */
	if (addr == DMA_MAPPING_ERROR || attrs & DMA_ATTR_MMIO)
		return addr;
	if (coiommu_track(ep, addr, size)) {
		dma_unmap_phys(ep->shadow, addr, size, dir,
			       attrs | DMA_ATTR_SKIP_CPU_SYNC);
		return DMA_MAPPING_ERROR;
	}
	return addr;
}

static void coiommu_unmap_phys(struct device *dev, dma_addr_t addr, size_t size,
			       enum dma_data_direction dir, unsigned long attrs)
{
	struct coiommu_endpoint *ep = endpoint_of(dev);

	dma_unmap_phys(ep->shadow, addr, size, dir, attrs);
	if (!(attrs & DMA_ATTR_MMIO))
		coiommu_untrack(ep, addr, size);
}
#else
static dma_addr_t coiommu_map_page(struct device *dev, struct page *page,
				   unsigned long offset, size_t size,
				   enum dma_data_direction dir,
				   unsigned long attrs)
{
	struct coiommu_endpoint *ep = endpoint_of(dev);
	dma_addr_t addr = dma_map_page_attrs(ep->shadow, page, offset, size,
					     dir, attrs);

	if (addr == DMA_MAPPING_ERROR)
		return addr;
	if (coiommu_track(ep, addr, size)) {
		dma_unmap_page_attrs(ep->shadow, addr, size, dir,
				     attrs | DMA_ATTR_SKIP_CPU_SYNC);
		return DMA_MAPPING_ERROR;
	}
	return addr;
}

static void coiommu_unmap_page(struct device *dev, dma_addr_t addr, size_t size,
			       enum dma_data_direction dir, unsigned long attrs)
{
	struct coiommu_endpoint *ep = endpoint_of(dev);

	dma_unmap_page_attrs(ep->shadow, addr, size, dir, attrs);
	coiommu_untrack(ep, addr, size);
}

/* MMIO is no memory: there is nothing to pin. */
static dma_addr_t coiommu_map_resource(struct device *dev, phys_addr_t phys,
				       size_t size, enum dma_data_direction dir,
				       unsigned long attrs)
{
	return dma_map_resource(shadow_of(dev), phys, size, dir, attrs);
}

static void coiommu_unmap_resource(struct device *dev, dma_addr_t addr,
				   size_t size, enum dma_data_direction dir,
				   unsigned long attrs)
{
	dma_unmap_resource(shadow_of(dev), addr, size, dir, attrs);
}
#endif

static bool has_p2p_page(struct scatterlist *sgl, unsigned int nents)
{
	struct scatterlist *sg;
	unsigned int i;

	for_each_sg(sgl, sg, nents, i)
		if (is_pci_p2pdma_page(sg_page(sg)))
			return true;
	return false;
}

static int coiommu_map_sg(struct device *dev, struct scatterlist *sgl,
			  int nents, enum dma_data_direction dir,
			  unsigned long attrs)
{
	struct coiommu_endpoint *ep = endpoint_of(dev);
	struct sg_table sgt = { .sgl = sgl, .orig_nents = nents };
	int err;

	/* A driver that asked was told that this does not work. */
	if (has_p2p_page(sgl, nents))
		return -EREMOTEIO;
	err = dma_map_sgtable(ep->shadow, &sgt, dir, attrs);
	if (err)
		return err;
	err = coiommu_track_sg(ep, sgl, sgt.nents);
	if (err) {
		dma_unmap_sg_attrs(ep->shadow, sgl, nents, dir,
				   attrs | DMA_ATTR_SKIP_CPU_SYNC);
		return err;
	}
	return sgt.nents;
}

/* The delegate maps entry by entry and leaves the addresses where they are. */
static void coiommu_unmap_sg(struct device *dev, struct scatterlist *sgl,
			     int nents, enum dma_data_direction dir,
			     unsigned long attrs)
{
	struct coiommu_endpoint *ep = endpoint_of(dev);

	dma_unmap_sg_attrs(ep->shadow, sgl, nents, dir, attrs);
	coiommu_untrack_sg(ep, sgl, nents);
}

static void coiommu_sync_single_for_cpu(struct device *dev, dma_addr_t addr,
					size_t size,
					enum dma_data_direction dir)
{
	dma_sync_single_for_cpu(shadow_of(dev), addr, size, dir);
}

static void coiommu_sync_single_for_device(struct device *dev, dma_addr_t addr,
					   size_t size,
					   enum dma_data_direction dir)
{
	dma_sync_single_for_device(shadow_of(dev), addr, size, dir);
}

static void coiommu_sync_sg_for_cpu(struct device *dev, struct scatterlist *sgl,
				    int nents, enum dma_data_direction dir)
{
	dma_sync_sg_for_cpu(shadow_of(dev), sgl, nents, dir);
}

static void coiommu_sync_sg_for_device(struct device *dev,
				       struct scatterlist *sgl, int nents,
				       enum dma_data_direction dir)
{
	dma_sync_sg_for_device(shadow_of(dev), sgl, nents, dir);
}

/* Asked for both of the driver's masks, before either is set. */
static int coiommu_dma_supported(struct device *dev, u64 mask)
{
	return !dma_set_coherent_mask(shadow_of(dev), mask);
}

static u64 coiommu_get_required_mask(struct device *dev)
{
	struct coiommu_endpoint *ep = endpoint_of(dev);

	coiommu_refresh_shadow(ep, dev);
	return dma_get_required_mask(ep->shadow);
}

static size_t coiommu_max_mapping_size(struct device *dev)
{
	return dma_max_mapping_size(shadow_of(dev));
}

/* What is absent here (opt_mapping_size, ...) dma-direct lacks too. */
const struct dma_map_ops coiommu_dma_ops = {
	.alloc			= coiommu_alloc,
	.free			= coiommu_free,
	.alloc_pages_op		= coiommu_alloc_pages,
	.free_pages		= coiommu_free_pages,
	.mmap			= coiommu_mmap,
	.get_sgtable		= coiommu_get_sgtable,
#ifdef COIOMMU_MAP_PHYS
	.map_phys		= coiommu_map_phys,
	.unmap_phys		= coiommu_unmap_phys,
#else
	.map_page		= coiommu_map_page,
	.unmap_page		= coiommu_unmap_page,
	.map_resource		= coiommu_map_resource,
	.unmap_resource		= coiommu_unmap_resource,
#endif
	.map_sg			= coiommu_map_sg,
	.unmap_sg		= coiommu_unmap_sg,
	.sync_single_for_cpu	= coiommu_sync_single_for_cpu,
	.sync_single_for_device	= coiommu_sync_single_for_device,
	.sync_sg_for_cpu	= coiommu_sync_sg_for_cpu,
	.sync_sg_for_device	= coiommu_sync_sg_for_device,
	.dma_supported		= coiommu_dma_supported,
	.get_required_mask	= coiommu_get_required_mask,
	.max_mapping_size	= coiommu_max_mapping_size,
};
