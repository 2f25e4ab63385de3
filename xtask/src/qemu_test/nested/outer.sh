# What the jobs of the outer VM have in common; each of them comes after this.
set -e

# One of them is the processor's.
case $accel in
    kvm*) modprobe kvm_amd 2>/dev/null || modprobe kvm_intel ;;
esac

# The devices, by their slots on bus 0, here and in guests: the kernel's VFIO has them.
slots='03 05 06 07'
for slot in $slots; do
    echo vfio-pci >/sys/bus/pci/devices/0000:00:$slot.0/driver_override
    echo 0000:00:$slot.0 >/sys/bus/pci/drivers_probe
done

# Of guests, in MiB.
memory=512

# By which guests have an IOMMU that remaps interrupts, which several vectors of MSI take, and that does no more.
remapped="-machine kernel-irqchip=split -device intel-iommu,intremap=on,caching-mode=on,aw-bits=39"
append="$append intel_iommu=off"

# Waits until a command succeeds.
await() {
    for n in $(seq 600); do
        if "$@" 2>/dev/null; then return; fi
        sleep 0.1
    done
    echo "waited in vain: $*"
    return 1
}

# Starts a program, whose process is $pid, and says what it has ended with.
run() {
    name=$1
    shift
    rm -f /tmp/$name.pid
    (
        status=0
        sh -c 'echo $$ >/tmp/'$name'.pid; exec "$@"' sh "$@" || status=$?
        echo "$name: exit $status"
        # Who waits for a line of its guest's is told, too.
        if [ $name = qemu ]; then echo "qemu: exit $status" >&4; fi
    ) &
    await test -s /tmp/$name.pid
    pid=$(cat /tmp/$name.pid)
}

# Options of QEMU: the devices as it passes them through by itself.
plain() {
    for slot in $slots; do
        echo "-device vfio-pci,host=0000:00:$slot.0,addr=$slot.0"
    done
}

# Options of QEMU: the devices as the server passes them through, and CoIOMMU's.
tracked() {
    echo "-object memory-backend-memfd,id=ram,size=${memory}M,share=on -machine memory-backend=ram"
    for slot in 08 $slots; do
        echo "-device {\"driver\":\"vfio-user-pci\",\"socket\":{\"path\":\"/tmp/$slot.sock\",\"type\":\"unix\"},\"addr\":\"$slot.0\"}"
    done
}

# Starts a server for the devices, with these options.
serve() {
    devices=
    for slot in $slots; do
        devices="$devices --passthrough host=0000:00:$slot.0,guest=00:$slot.0,socket=/tmp/$slot.sock"
    done
    run server coiommu serve --socket /tmp/08.sock --control /tmp/ctl --vcpus 2 $devices "$@"
    server=$pid
    await listens
}

listens() { coiommu ctl --control /tmp/ctl stats 2>&1 | grep -q 'no VMM'; }

# Says the server's figures.
figures() { echo "server $(coiommu ctl --control /tmp/ctl --json stats | tr -d '\n')"; }

# Starts a guest, with these options of QEMU: it is not waited for.
start() {
    rm -f /tmp/job.in /tmp/job.out
    mkfifo /tmp/job.in /tmp/job.out
    # Both ways, so that neither end waits for the other.
    exec 4<>/tmp/job.out 5<>/tmp/job.in
    echo "a guest with $memory MiB: $*" >/dev/port-inner
    run qemu /qemu/lib/ld-linux-x86-64.so.2 --library-path /qemu/lib /qemu/qemu-system-x86_64 -L /qemu/share \
        -M q35 -accel $accel -smp 2 -m $memory -nodefaults -display none \
        -chardev file,id=console,path=/dev/port-inner,append=on -serial chardev:console \
        -chardev pipe,id=job,path=/tmp/job \
        -device virtio-serial-pci,addr=10.0 -device virtserialport,chardev=job,name=job \
        -drive if=none,id=source,format=raw,file=/dev/vda,readonly=on \
        -device virtio-blk-pci,drive=source,addr=11.0 \
        -kernel /qemu/vmlinux -initrd /qemu/inner.cpio -append "$append" "$@"
    qemu=$pid
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
