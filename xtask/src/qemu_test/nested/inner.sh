# The job of inner guests, after lib.sh: to do what they are told, line by line.

# Says the sum of so many MiB of what comes in.
sum() { echo "sum $1 $(head -c $(($2 << 20)) | sha256sum | cut -d' ' -f1)"; }

# Says how often devices have interrupted.
irqs() {
    awk '/PCI-MSI|fasteoi/ && !/virtio|acpi/ {
        count = 0
        for (i = 2; $i ~ /^[0-9]+$/; i++) count += $i
        printf "irq %d", count
        for (; i <= NF; i++) printf " %s", $i
        print ""
    }' /proc/interrupts
}

# Writes to the disk, and reads that.
use_nvme() {
    nvme_up
    dd if=/dev/vda of=/dev/nvme0n1 bs=1M count=$written conv=fsync 2>/dev/null
    forget
    sum nvme $written </dev/nvme0n1
}

# Downloads by a network card.
use_net() {
    net_up $1
    download | sum $1 $download
    irqs
    net_down $1
}

# Reads what is behind the USB controller, then has that interrupt by each of its vectors.
use_usb() {
    modprobe -a xhci_pci usb_storage sd_mod
    await test -b /dev/sda
    sum usb $stick </dev/sda
    irqs
    rmmod xhci_pci
    modprobe vectors
    irqs
}

# Whether the device at a slot may do DMA, as it says itself.
mastering() {
    command=$(dd if=/sys/bus/pci/devices/0000:00:$1.0/config bs=1 skip=4 count=1 2>/dev/null | od -An -tu1)
    if [ $((command & 4)) = 0 ]; then echo off; else echo on; fi
}

# Keeps the disk and the network busy until rest.
load_devices() {
    nvme_up
    net_up e1000e
    busy_file=/dev/nvme0n1
    load
}

while
    echo =done
    read -r line
do
    eval "$line"
done
