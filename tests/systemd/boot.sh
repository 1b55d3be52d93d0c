#!/bin/sh
# The systemd of a lab (see lab.py), in three stages. CGROUP and ROOM are directories: the lab's control group, and
# where its root is built, in a tmpfs that only it sees. Nothing of the host changes.
#
#   boot.sh keep CGROUP ROOM LIFE_S [SOURCE TARGET]...    each SOURCE is bound, read-only, to TARGET inside
set -eu

stage=$1 cgroup=$2 room=$3
shift 3

if [ "$stage" = keep ]; then # outside: lives as long as the lab, and removes what is left of it
    life_s=$1
    shift
    clean() {
        trap '' TERM
        kill -KILL "$child" 2>/dev/null || true
        for _ in $(seq 100); do # a control group goes when the last process in it is gone
            find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true
            [ -d "$cgroup" ] || break
            sleep 0.1
        done
        rm -rf "$room"
    }
    mkdir "$cgroup"
    # Each process of the chain dies with the one before; the last is systemd, and its end ends all inside.
    setpriv --pdeathsig KILL timeout --signal=KILL "$life_s" \
        setpriv --pdeathsig KILL "$0" enter "$cgroup" "$room" "$@" &
    child=$!
    trap clean EXIT
    trap exit TERM
    wait "$child"
    exit
fi

if [ "$stage" = enter ]; then
    echo 0 >"$cgroup/cgroup.procs" # before the cgroup namespace: its root is where we are then
    exec unshare --mount --pid --fork --kill-child --uts --ipc --net --cgroup "$0" inside "$cgroup" "$room" "$@"
fi

mount -t tmpfs tmpfs "$room/stage" # an overlay's upper layer must not be an overlay itself
mkdir "$room/stage/upper" "$room/stage/work" "$room/stage/root"
mount -t overlay overlay "$room/stage/root" \
    -o "lowerdir=/,upperdir=$room/stage/upper,workdir=$room/stage/work"
cd "$room/stage/root"

# Kernel file systems, read-only where settings are global, as container managers hand them out.
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for node in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "dev/${node%:*}" c 1 "${node#*:}"
done
mknod -m 666 dev/tty c 5 0
ln -s /proc/self/fd dev/fd
ln -s pts/ptmx dev/ptmx
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm

# What the host remembers or runs at boot is not the lab's business.
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs var/log
rm -rf etc/systemd/system etc/fstab lib/systemd/system-generators/* usr/lib/systemd/system-generators/*
mkdir -p run/lock run/host etc/systemd/system

while [ $# -gt 0 ]; do
    mkdir -p "./$2"
    mount --rbind "$1" "./$2"
    mount -o remount,bind,ro "./$2"
    shift 2
done

cat >etc/systemd/system/lab.target <<'UNIT'
[Unit]
Description=Nothing but the journal
Wants=systemd-journald.service systemd-sysusers.service systemd-tmpfiles-setup.service
UNIT
: >run/host/notify
mount --bind "$room/notify" run/host/notify # systemd tells the outside when it is up
mount --make-rshared . # as on a booted machine: credentials, for one, are mounted for us by a child of systemd

# Not even a real systemd may load modules or set the clock of the host.
exec setpriv --bounding-set=-sys_module,-sys_time,-sys_rawio,-sys_boot \
    env -i container=petalsd-lab NOTIFY_SOCKET=/run/host/notify PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    chroot . /lib/systemd/systemd --system --unit=lab.target --log-target=journal --show-status=no
