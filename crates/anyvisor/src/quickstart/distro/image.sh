# Last hook of mmdebstrap: makes the disk image of the Debian in $1.
set -eu
root=$1
echo "I: writing the file system..." >&2
rm -f "$root/run/key" "$root/run/known_hosts"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/cache/apt/*.bin "$root"/var/lib/apt/lists/*_*
# What mmdebstrap itself takes away only after its hooks: with these, no service would be started when its package is
# installed, and apt would not install what packages recommend.
rm -f "$root/usr/sbin/policy-rc.d" "$root/etc/apt/apt.conf.d/00mmdebstrap" "$root/var/lib/dbus/machine-id"
[ ! -e "$root/sbin/start-stop-daemon.REAL" ] || mv "$root/sbin/start-stop-daemon.REAL" "$root/sbin/start-stop-daemon"

# mmdebstrap has mounted /proc and others below the root; a bind mount of the root alone has them not. Where it may not
# mount, there are none.
files=$root
if mount --bind "$root" "$root/mnt" 2>/dev/null; then
    files=$root/mnt
    trap 'umount "$files"' EXIT
fi
mke2fs -q -F -t ext4 -L debian -d "$files" "$anyvisor_disk" "$anyvisor_size"
