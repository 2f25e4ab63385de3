// SPDX-License-Identifier: GPL-2.0-only
/*
 * A driver for a USB controller (xHCI) that has it interrupt by four vectors
 * of MSI, ten times each. The usual driver takes several vectors, and uses the
 * first. For tests: /proc/interrupts shows what came, as long as this is
 * loaded. The controller reads the tables of its event rings by DMA.
 */
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/dma-mapping.h>
#include <linux/interrupt.h>
#include <linux/module.h>
#include <linux/pci.h>

#define VECTORS		4
#define TIMES		10

/* Registers of the controller: the eXtensible Host Controller Interface, 5. */
#define RTSOFF		0x18
#define USBCMD_HCRST	BIT(1)
#define USBCMD_INTE	BIT(2)
#define INTERRUPTER(n)	(0x20 + 0x20 * (n))
#define IMAN		0x00
#define IMAN_IP		BIT(0)
#define IMAN_IE		BIT(1)
#define ERSTSZ		0x08
#define ERSTBA		0x10
#define ERDP		0x18
#define ERDP_EHB	BIT(3)

/* A ring of one piece, behind the entry that says so. */
#define RING_AT		64
#define TRBS		16
#define TRB_BYTES	16

struct vector {
	void __iomem *interrupter;
	struct completion came;
};

struct vectors {
	struct pci_dev *pdev;
	void __iomem *regs;
	struct vector vectors[VECTORS];
};

struct segment {
	__le64 ring;
	__le32 trbs;
	__le32 reserved;
};

static irqreturn_t interrupted(int irq, void *data)
{
	struct vector *vector = data;

	writel(IMAN_IP | IMAN_IE, vector->interrupter + IMAN);
	complete(&vector->came);
	return IRQ_HANDLED;
}

static void write_address(u64 address, void __iomem *to)
{
	writel(lower_32_bits(address), to);
	writel(upper_32_bits(address), to + 4);
}

/*
 * Who handles events says up to where it did. Each time that is not up to where
 * the controller has got, it interrupts again: so for as long as that is wrong.
 */
static int interrupt(struct vectors *v, unsigned int n)
{
	struct vector *vector = &v->vectors[n];
	struct segment *segment;
	dma_addr_t at;
	unsigned int i;

	segment = dmam_alloc_coherent(&v->pdev->dev, PAGE_SIZE, &at, GFP_KERNEL);
	if (!segment)
		return -ENOMEM;
	segment->ring = cpu_to_le64(at + RING_AT);
	segment->trbs = cpu_to_le32(TRBS);
	writel(1, vector->interrupter + ERSTSZ);
	write_address(at + RING_AT, vector->interrupter + ERDP);
	write_address(at, vector->interrupter + ERSTBA);
	writel(IMAN_IE, vector->interrupter + IMAN);
	for (i = 0; i < TIMES; i++) {
		writel(upper_32_bits(at), vector->interrupter + ERDP + 4);
		writel(lower_32_bits(at + RING_AT + TRB_BYTES) | ERDP_EHB,
		       vector->interrupter + ERDP);
		if (!wait_for_completion_timeout(&vector->came, 10 * HZ)) {
			dev_err(&v->pdev->dev, "vector %u: no interrupt %u\n", n, i);
			return -ETIMEDOUT;
		}
	}
	return 0;
}

static int vectors_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct device *dev = &pdev->dev;
	struct vectors *v;
	void __iomem *operational, *runtime;
	unsigned int i;
	int ret;

	v = devm_kzalloc(dev, sizeof(*v), GFP_KERNEL);
	if (!v)
		return -ENOMEM;
	v->pdev = pdev;
	ret = pcim_enable_device(pdev);
	if (ret)
		return ret;
	ret = dma_set_mask_and_coherent(dev, DMA_BIT_MASK(64));
	if (ret)
		return ret;
	v->regs = pcim_iomap(pdev, 0, 0);
	if (!v->regs)
		return -ENOMEM;
	operational = v->regs + readb(v->regs);
	runtime = v->regs + readl(v->regs + RTSOFF);
	writel(USBCMD_HCRST, operational);
	msleep(20);
	pci_set_master(pdev);

	/* Freed with the device, as it is managed. */
	ret = pci_alloc_irq_vectors(pdev, VECTORS, VECTORS, PCI_IRQ_MSI);
	if (ret < 0)
		return dev_err_probe(dev, ret, "no %d vectors of MSI\n", VECTORS);
	for (i = 0; i < VECTORS; i++) {
		struct vector *vector = &v->vectors[i];

		vector->interrupter = runtime + INTERRUPTER(i);
		init_completion(&vector->came);
		ret = devm_request_irq(dev, pci_irq_vector(pdev, i), interrupted,
				       0, devm_kasprintf(dev, GFP_KERNEL, "vector-%u", i),
				       vector);
		if (ret)
			return ret;
	}
	writel(USBCMD_INTE, operational);
	for (i = 0; i < VECTORS; i++) {
		ret = interrupt(v, i);
		if (ret)
			return ret;
	}
	pci_set_drvdata(pdev, v);
	return 0;
}

static void vectors_remove(struct pci_dev *pdev)
{
	struct vectors *v = pci_get_drvdata(pdev);

	writel(USBCMD_HCRST, v->regs + readb(v->regs));
	pci_clear_master(pdev);
}

static const struct pci_device_id vectors_ids[] = {
	{ PCI_VDEVICE(NEC, 0x0194) },
	{ }
};

static struct pci_driver vectors_driver = {
	.name = "vectors",
	.id_table = vectors_ids,
	.probe = vectors_probe,
	.remove = vectors_remove,
};
module_pci_driver(vectors_driver);

MODULE_DESCRIPTION("Has a USB controller interrupt by several vectors of MSI");
MODULE_LICENSE("GPL");
