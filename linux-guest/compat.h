/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between the kernels that this driver is for: 6.1 to 7.3.
 * Kbuild looks for it in the kernel's headers, as distributions backport.
 */
#ifndef COIOMMU_COMPAT_H
#define COIOMMU_COMPAT_H

#include <linux/dma-map-ops.h>

#ifndef CONFIG_X86_64
#error "coiommu is for x86-64 guests"
#endif

#if !defined(CONFIG_DMA_OPS) && !defined(CONFIG_ARCH_HAS_DMA_OPS)
#error "coiommu needs a kernel that lets devices have DMA ops of their own"
#endif

/* Before 6.12, dma-iommu is dma_map_ops like any other. */
#ifdef COIOMMU_USE_DMA_IOMMU
#include <linux/iommu-dma.h>
#else
static inline bool use_dma_iommu(struct device *dev)
{
	return false;
}
#endif

/* Before 6.10, all devices are asked for syncs. */
#ifndef COIOMMU_RESET_NEED_SYNC
static inline void dma_reset_need_sync(struct device *dev)
{
}
#endif

#ifndef COIOMMU_ALLOC_PAGES_OP
#define alloc_pages_op alloc_pages
#endif

#endif
