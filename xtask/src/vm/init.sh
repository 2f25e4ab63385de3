#!/bin/busybox sh
# The first process of a VM: makes a system around /job, runs it, and says what it exited with.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ RUST_BACKTRACE=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
ulimit -l unlimited

# What the job is heard through; many kernels have it built in.
modprobe -a virtio_pci virtio_console 2>/dev/null
for port in /sys/class/virtio-ports/*; do
    ln -s "${port##*/}" "/dev/port-$(cat "$port/name")"
done
exec 3<>/dev/port-job
echo "job: begins" >&3
while read -r module; do
    modprobe "$module" 2>&3 || echo "cannot load $module" >&3
done </etc/modules

sh /job <&3 >&3 2>&3
echo "job: exit $?" >&3
exec 3>&-
if grep -qw keep /proc/cmdline; then
    printf '\nThe job is done; this is a shell in the VM. Ctrl-A X ends it.\n'
    setsid cttyhack sh
fi
poweroff -f
