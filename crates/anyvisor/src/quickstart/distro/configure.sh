# First hook of mmdebstrap: makes the Debian that is unpacked in $1 a machine of anyvisor's.
set -eu
root=$1

echo debian >"$root/etc/hostname"
printf '127.0.0.1\tlocalhost\n127.0.1.1\tdebian\n' >"$root/etc/hosts"
echo '/dev/vda / ext4 errors=remount-ro 0 1' >"$root/etc/fstab"
echo LANG=C.UTF-8 >"$root/etc/default/locale"
# The first boot gives it a number.
: >"$root/etc/machine-id"
[ -z "$anyvisor_apt" ] || printf '%s\n' "$anyvisor_apt" >"$root/etc/apt/apt.conf.d/90anyvisor"

# Every network card asks for an address, and the name server comes with it.
printf '[Match]\nType=ether\n\n[Network]\nDHCP=yes\n' >"$root/etc/systemd/network/ether.network"
chroot "$root" systemctl --quiet enable systemd-networkd systemd-resolved
ln -sf /run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

# Who has the serial console is root. Root has no password, and ssh takes nothing but the key.
getty=$root/etc/systemd/system/serial-getty@ttyS0.service.d
mkdir -p "$getty"
cat >"$getty/autologin.conf" <<'END'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,57600,38400,9600 - $TERM
END
# A serial line does not tell its terminal's size.
cat >"$root/etc/profile.d/anyvisor.sh" <<'END'
if [ "$(tty)" = /dev/ttyS0 ] && grep -q anyvisor_rows= /proc/cmdline; then
    stty $(sed 's/.*anyvisor_rows=\([0-9]*\) anyvisor_columns=\([0-9]*\).*/rows \1 columns \2/' /proc/cmdline)
fi
END
echo 'PasswordAuthentication no' >"$root/etc/ssh/sshd_config.d/anyvisor.conf"
home=$root/root
install -d -m 700 "$home/.ssh"
chroot "$root" ssh-keygen -q -t ed25519 -N '' -C anyvisor -f /run/key
mv "$root/run/key.pub" "$home/.ssh/authorized_keys"
sed 's/^/debian /' "$root/etc/ssh/ssh_host_ed25519_key.pub" >"$root/run/known_hosts"

# Without a terminal the machine checks itself.
printf '%s\n' "$anyvisor_check" >"$root/usr/local/sbin/anyvisor-check"
chmod 755 "$root/usr/local/sbin/anyvisor-check"
cat >"$root/etc/systemd/system/anyvisor-check.service" <<'END'
[Unit]
Description=Check of this machine, for anyvisor quickstart
ConditionKernelCommandLine=anyvisor_check
[Service]
ExecStart=/usr/local/sbin/anyvisor-check
[Install]
WantedBy=multi-user.target
END
chroot "$root" systemctl --quiet enable anyvisor-check
