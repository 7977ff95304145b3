#!/bin/sh
# Checks this machine once it has booted, says on the console how that went, and powers off. The last line has the number
# that `anyvisor quickstart --distro` has put on the kernel's command line.
say() { printf '%s\n' "$*" >/dev/console; }
failed=0
check() {
    if "$@"; then
        say "check $1: ok"
    else
        say "check $1: FAILED"
        failed=1
    fi
}

units() {
    [ "$(systemctl is-system-running --wait)" = running ] || { systemctl --failed --no-legend --plain >/dev/console; false; }
}
network() {
    for _ in $(seq 60); do
        ip -4 -o addr show scope global | grep -q . && ip route | grep -q ^default && return
        sleep 1
    done
    false
}
name_server() { resolvectl dns | grep -q '[0-9]\.[0-9]'; }
ssh() { timeout 60 bash -c 'read -r greeting </dev/tcp/127.0.0.1/22 && [[ $greeting = SSH-2.0-* ]]'; }
packages() { [ -z "$(dpkg --audit)" ]; }
disk() {
    dd if=/dev/urandom of=/var/tmp/a bs=64k count=256 2>/dev/null && cp /var/tmp/a /var/tmp/b && sync &&
        echo 3 >/proc/sys/vm/drop_caches && cmp /var/tmp/a /var/tmp/b && rm /var/tmp/a /var/tmp/b
}
kernel_log() { ! dmesg | grep -E 'BUG:|WARNING:|Oops|Call Trace|general protection|EXT4-fs error|I/O error' >/dev/console; }

say "anyvisor quickstart: checking $(. /etc/os-release && echo "$PRETTY_NAME"), Linux $(uname -r)"
for what in units network name_server ssh packages disk kernel_log; do check "$what"; done
number=$(sed -n 's/.*anyvisor_check=\([0-9a-f]*\).*/\1/p' /proc/cmdline)
[ $failed = 0 ] && say "anyvisor self-check passed: $number"
systemctl poweroff --no-wall
