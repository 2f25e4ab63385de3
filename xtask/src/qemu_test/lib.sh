# What the jobs of guests have in common; each of them comes after this.
set -e
mount -t debugfs debugfs /sys/kernel/debug

# Asks the host, which may take its time; what it says is in $answer.
ask() {
    echo "$1"
    read -r answer
}

# Waits until a command succeeds.
await() {
    for n in $(seq 600); do
        if "$@" 2>/dev/null; then return; fi
        sleep 0.1
    done
    echo "waited in vain: $*"
    return 1
}

coiommu_up() {
    modprobe coiommu "$@"
    stats=$(echo /sys/kernel/debug/coiommu/*/stats)
}

# Prints the driver's counters, each name with something before it.
counters() {
    sed "s/^/stat $1/" "$stats"
    # Bounce slots, now or ever: not every kernel counts both. A guest that has no memory above 4 GiB has none.
    if [ -e /sys/kernel/debug/swiotlb/io_tlb_used ]; then
        echo "stat $1swiotlb $(cat /sys/kernel/debug/swiotlb/io_tlb_used* | sort -n | tail -n 1)"
    fi
}

nvme_up() {
    modprobe nvme
    await test -b /dev/nvme0n1
}

# A file system on the nvme.
mnt_up() {
    modprobe crc32c_generic 2>/dev/null || true
    modprobe ext4
    mke2fs /dev/nvme0n1 >/dev/null
    mkdir -p /mnt
    mount -t ext4 /dev/nvme0n1 /mnt
}

# Where load writes to.
busy_file=/mnt/load

has_carrier() { [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; }

# The network, by a driver.
net_up() {
    modprobe "$1"
    await test -e /sys/class/net/eth0
    ip link set dev eth0 up
    ip addr add 10.0.2.15/24 dev eth0
    await has_carrier
}

net_down() {
    ip link set dev eth0 down
    rmmod "$1"
}

# What the host has for us, to standard output.
download() { nc 10.0.2.100 80 </dev/null; }

# The driver first, then its endpoints' drivers.
everything_up() {
    coiommu_up
    nvme_up
    net_up e1000e
    mnt_up
}

everything_down() {
    umount /mnt
    ip link set dev eth0 down
}

forget() { echo 3 >/proc/sys/vm/drop_caches; }

# Keeps the disk and the network busy until rest, with pages that change.
load() {
    touch /tmp/busy
    while [ -e /tmp/busy ]; do
        dd if=/dev/vda of=$busy_file bs=1M count=16 2>/dev/null || true
        sync
        forget
        head -c 16777216 $busy_file >/dev/null || true
    done &
    disk_load=$!
    while [ -e /tmp/busy ]; do
        download >/dev/null || true
    done &
    net_load=$!
}

rest() {
    rm -f /tmp/busy
    wait $disk_load $net_load
}
