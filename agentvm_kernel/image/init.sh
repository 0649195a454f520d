#!/bin/busybox sh
# First program of a guest: loads the modules that the root file system needs, mounts it and hands over to the runtime.
# The host appends /agentvm (runtime, secret, boot.json) to this initramfs for every machine.
fail() {
    echo "agentvm: the guest cannot boot: $*"
    /bin/busybox poweroff -f
}
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev || fail "no devtmpfs"
exec </dev/console >/dev/console 2>&1
while read -r module; do
    insmod "/modules/$module" || echo "agentvm: module $module did not load"
done </modules/order
tries=0
until [ -b /dev/vda ]; do
    tries=$((tries + 1))
    [ $tries -gt 1000 ] && fail "no disk /dev/vda appeared within 10 s"
    usleep 10000
done
mount -t ext4 -o noatime /dev/vda /root || fail "/dev/vda does not mount as ext4"
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /root/run || fail "no tmpfs for /run"
mkdir -p /root/run/agentvm
cp -r /agentvm/. /root/run/agentvm/ || fail "the runtime is missing from the initramfs"
chmod 600 /root/run/agentvm/secret /root/run/agentvm/boot.json
mount --move /proc /root/proc
mount --move /sys /root/sys
mount --move /dev /root/dev
export PYTHONPATH=/run/agentvm/lib PYTHONSAFEPATH=1 PATH=/opt/notebook/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LANG=C.UTF-8 HOME=/root
exec switch_root /root /opt/notebook/bin/python3 -P -m guest_runtime.init
