# What the jobs of the outer VM have in common; each of them comes after this.
set -e

# One of them is the processor's.
case $accel in
    kvm*) modprobe kvm_amd 2>/dev/null || modprobe kvm_intel ;;
esac

# By which guests have an IOMMU that remaps interrupts, which several vectors of MSI take, and that does no more.
remapped="-machine kernel-irqchip=split -device intel-iommu,intremap=on,caching-mode=on,aw-bits=39"
append="$append intel_iommu=off"

# The options of a guest's QEMU by which it has the devices at these slots, as the kernel's VFIO gives them.
plain() {
    for slot in "$@"; do
        echo "-device vfio-pci,host=0000:00:$slot.0,addr=$slot.0"
    done
}

# Gives the devices at these slots to VFIO.
give() {
    for slot in "$@"; do
        echo vfio-pci >/sys/bus/pci/devices/0000:00:$slot.0/driver_override
        echo 0000:00:$slot.0 >/sys/bus/pci/drivers_probe
    done
}

# Starts a guest with so many MiB and these options of QEMU: it does not wait until the guest is up.
start() {
    memory=$1
    shift
    rm -f /tmp/job.in /tmp/job.out
    mkfifo /tmp/job.in /tmp/job.out
    # Both ways, so that neither end waits for the other.
    exec 4<>/tmp/job.out 5<>/tmp/job.in
    echo "a guest with $memory MiB: $*" >/dev/port-inner
    (
        status=0
        sh -c 'echo $$ >/tmp/qemu.pid; exec "$@"' sh \
            /qemu/lib/ld-linux-x86-64.so.2 --library-path /qemu/lib /qemu/qemu-system-x86_64 -L /qemu/share \
            -M q35 -accel $accel -smp 2 -m $memory -nodefaults -display none \
            -chardev file,id=console,path=/dev/port-inner,append=on -serial chardev:console \
            -chardev pipe,id=job,path=/tmp/job \
            -device virtio-serial-pci,addr=10.0 -device virtserialport,chardev=job,name=job \
            -drive if=none,id=source,format=raw,file=/dev/vda,readonly=on \
            -device virtio-blk-pci,drive=source,addr=11.0 \
            -kernel /qemu/vmlinux -initrd /qemu/inner.cpio -append "$append" "$@" || status=$?
        echo "qemu: exit $status" >&4
    ) &
}

# Waits for a line of the guest's that begins like this, and prints what comes before it.
hear() {
    while read -r line <&4; do
        case $line in
            "$1"*) return ;;
            "job: exit "[!0]* | "qemu: exit"*)
                echo "the guest has not said '$1': $line"
                return 1
                ;;
            *) echo "$line" ;;
        esac
    done
}

# Waits until the guest is up.
up() {
    hear 'job: begins'
    hear '=done'
}

# Has the guest carry out a line of shell, and prints what that says. One that fails ends the guest.
inner() {
    echo "$*" >&5
    hear =done
}

# Has the guest power itself off.
off() {
    echo 'exit 0' >&5
    hear 'qemu: exit 0'
}
