#!/bin/sh
# First process of the quickstart guest: a shell for the user or, with anyvisor_check=NONCE on the kernel
# command line (the kernel puts such words into our environment), a check of the machine.
export PATH=/bin HOME=/ TERM=${TERM:-vt100}
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp

if [ -z "$anyvisor_check" ]; then
    stty rows "${anyvisor_rows:-24}" cols "${anyvisor_columns:-80}" 2>/dev/null
    echo
    echo "This is Linux $(uname -r) with $(nproc) CPU(s), in anyvisor. Leave with 'exit' or Ctrl-A X."
    PS1='guest:\w# ' setsid cttyhack sh
    poweroff -f
fi

failed=0
# check NAME COMMAND...: runs the command, and says how it went.
check() {
    name=$1
    shift
    if "$@"; then
        echo "check $name: ok"
    else
        echo "check $name: FAILED"
        failed=1
    fi
}

cpus() { [ "$(nproc)" = "$anyvisor_cpus" ] && [ "$(grep -c '^flags.* lm .* sse4_2 ' /proc/cpuinfo)" = "$anyvisor_cpus" ]; }
memory() {
    total=$(awk '/^MemTotal:/ { print int($2 / 1024) }' /proc/meminfo)
    [ "$total" -le "$anyvisor_memory" ] && [ "$total" -ge $((anyvisor_memory * 3 / 4)) ]
}
clock() {
    now=$(date +%s)
    [ "$now" -ge $((anyvisor_time - 2)) ] && [ "$now" -le $((anyvisor_time + 900)) ]
}
sleeps() {
    start=$(date +%s)
    sleep 2
    end=$(date +%s)
    [ $((end - start)) -ge 1 ] && [ $((end - start)) -le 10 ]
}
pipes() { [ "$(seq 1 2000 | sort -rn | head -n 1000 | tail -n 1)" = 1001 ]; }
files() {
    dd if=/dev/urandom of=/tmp/a bs=64k count=64 2>/dev/null &&
        cp /tmp/a /tmp/b && gzip /tmp/b && gunzip /tmp/b.gz && cmp /tmp/a /tmp/b &&
        [ "$(sha256sum </tmp/a)" = "$(sha256sum </tmp/b)" ] && rm /tmp/a /tmp/b
}
forks() {
    i=0
    while [ $i -lt 200 ]; do
        (exit $((i % 100)))
        [ $? = $((i % 100)) ] || return 1
        i=$((i + 1))
    done
}
processes() {
    for i in 1 2 3 4 5 6 7 8; do
        (seq 1 500 | while read -r n; do echo $((n * n)); done >/tmp/squares$i) &
    done
    wait
    for i in 1 2 3 4 5 6 7 8; do
        [ "$(tail -n 1 /tmp/squares$i)" = 250000 ] || return 1
    done
}
fractions() {
    # The thousandth harmonic number.
    sum=$(awk 'BEGIN { for (i = 1; i <= 1000; i++) sum += 1 / i; printf "%.9f", sum }')
    [ "$sum" = 7.485470861 ]
}
signals() {
    timeout 1 sleep 30
    [ $? = 143 ]
}
kernel_log() { ! dmesg | grep -E 'BUG:|WARNING:|Oops|Call Trace|general protection|Kernel panic'; }

echo "anyvisor quickstart: checking Linux $(uname -r)"
check cpus cpus
check memory memory
check clock clock
check sleep sleeps
check pipes pipes
check files files
check forks forks
check processes processes
check fractions fractions
check signals signals
check kernel-log kernel_log
[ $failed = 0 ] && echo "anyvisor self-check passed: $anyvisor_check"
poweroff -f
