# What the jobs of the outer VM have in common; each of them comes after this.
set -e

# One of them is the processor's.
case $accel in
    kvm*) modprobe kvm_amd 2>/dev/null || modprobe kvm_intel ;;
esac

# The devices, by their slots on bus 0 in guests, and where they are here. All but the first are behind ports, whose reset is
# one for them: emulated cards that come back from low power are as they were before.
slots='03 05 06 07'
host_of() {
    case $1 in
        03) echo 0000:00:03.0 ;;
        05) echo 0000:01:00.0 ;;
        06) echo 0000:02:00.0 ;;
        07) echo 0000:03:00.0 ;;
    esac
}

# The kernel's VFIO has them.
for slot in $slots; do
    host=$(host_of $slot)
    if [ $slot != 03 ]; then echo bus >/sys/bus/pci/devices/$host/reset_method; fi
    echo vfio-pci >/sys/bus/pci/devices/$host/driver_override
    echo $host >/sys/bus/pci/drivers_probe
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
        echo "-device vfio-pci,host=$(host_of $slot),addr=$slot.0"
    done
}

# Options of QEMU: the devices as the server passes them through, and CoIOMMU's.
tracked() {
    echo "-object memory-backend-memfd,id=ram,size=${memory}M,share=on -machine memory-backend=ram"
    for slot in 08 $slots; do
        echo "-device {\"driver\":\"vfio-user-pci\",\"socket\":{\"path\":\"/tmp/$slot.sock\",\"type\":\"unix\"},\"addr\":\"$slot.0\"}"
    done
}

# Starts a server for the devices, with these options: it is not waited for.
start_server() {
    devices=
    for slot in $slots; do
        devices="$devices --passthrough host=$(host_of $slot),guest=00:$slot.0,socket=/tmp/$slot.sock"
    done
    run server coiommu serve --socket /tmp/08.sock --control /tmp/ctl --vcpus 2 $devices "$@"
    server=$pid
}

# The same, and it is.
serve() {
    start_server "$@"
    await has_no_guest
}

has_no_guest() { coiommu ctl --control /tmp/ctl stats 2>&1 | grep -q 'no VMM'; }

# The server's figures, as JSON.
stats() { coiommu ctl --control /tmp/ctl --json stats; }

say_stats() { echo "server $(stats | tr -d '\n')"; }

# Some of them, in the order that they have there, and no other.
figures() { echo $(stats | sed -n "s/^ *\"\($1\)\": \([0-9]*\),*$/\2/p"); }

# A process's memory in KiB: VmLck, VmPin, VmHWM and VmRSS. Zeros if it has gone.
memory_of() {
    set -- $(awk '/^Vm(Lck|Pin|HWM|RSS):/ { print $2 }' /proc/$1/status 2>/dev/null)
    echo ${1-0} ${2-0} ${3-0} ${4-0}
}

# Says, every second until samples_end, what is pinned, in how many mappings, and the memory of the server and of QEMU.
samples_begin() {
    touch /tmp/sampling
    while [ -e /tmp/sampling ]; do
        pinned=$(figures 'pinned_bytes\|mappings' 2>/dev/null)
        now=$(cut -d' ' -f1 /proc/uptime)
        echo "sample $now ${pinned:-0 0} $(memory_of $server) $(memory_of $(cat /tmp/qemu.pid))"
        sleep 1
    done &
    sampler=$!
}

samples_end() {
    rm /tmp/sampling
    wait $sampler
}

# Ends the job unless something is so.
expect() {
    what=$1
    shift
    if ! [ "$@" ]; then
        echo "$what: not $*"
        return 1
    fi
    echo "$what: $*"
}

# Tells who judges the outer kernel's console that a guest's devices may fault, until no_more_faults.
expect_faults() { echo "coiommu-test: faults $(all_memory)" >/dev/kmsg; }
no_more_faults() { echo "coiommu-test: no more faults $(all_memory)" >/dev/kmsg; }
all_memory() { printf 'from 0x0 to %#x' $((memory * 1048576 - 1)); }
has_faults() { dmesg | grep -q 'DMAR: .*fault addr'; }

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

# Ends QEMU, or a server, with a signal, and waits for that.
end() {
    kill -$1 $2
    gone $2
}

# Waits until it has ended.
gone() { await test ! -e /proc/$1; }

# Has the guest power itself off.
off() {
    echo 'exit 0' >&5
    hear 'qemu: exit 0'
}
