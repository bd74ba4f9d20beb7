#!/usr/bin/env bash
# Boots one Xen host of the lab under TCG, passes a job in, and ends when the job has.
#
#   tests/xen-lab/host.sh BUILT SHARE [PORT…]
#
# BUILT is what build.sh has made. SHARE/job is run in dom0, as /host/job, with SHARE as /host; what it prints is in
# SHARE/job.log afterwards, its exit code in SHARE/job.code, the host's console in SHARE/xen.log. TCP and UDP ports
# PORT… of this machine (of this network namespace) are dom0's. XEN picks the hypervisor: `xen`, or `xen-paging`, the
# default. STORAGE is a folder that is /storage in dom0, and whose disk.img is its /dev/loop0. LIMIT ends it after so
# many seconds, 600 by default.
set -euo pipefail

# What Xen and dom0 need switched off under TCG: without -smap and -smep dom0 faults at boot, with monitor Xen panics in
# mwait, with rdtscp guests hang, with xsave and avx dom0's registers are not safe.
CPU=EPYC,-smap,-smep,-monitor,-rdtscp,-xsave,-xsaveopt,-xsavec,-xgetbv1,-avx,-avx2,-f16c,-fma,+svm,+npt

built=$1 share=$2
shift 2
forward=
for port in "$@"; do
    forward+=",hostfwd=tcp::$port-:$port,hostfwd=udp::$port-:$port"
done
storage=()
if [ -n "${STORAGE:-}" ]; then
    storage=(-virtfs "local,path=$STORAGE,mount_tag=storage,security_model=none")
fi
rm -f "$share/job.code" "$share/job.log"
mkdir -p "$share/console"
timeout "${LIMIT:-600}" qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -accel tcg \
    -machine q35 -cpu "$CPU" -smp 1 -m 2560 \
    -kernel "$built/${XEN:-xen-paging}" \
    -append "console=com1 com1=115200,8n1 dom0_mem=1024M,max:1024M dom0_max_vcpus=1 noreboot" \
    -initrd "$built/dom0-vmlinuz console=hvc0 earlyprintk=xen rdinit=/init quiet nokaslr mitigations=off,$built/dom0.cpio" \
    -serial stdio -virtfs "local,path=$share,mount_tag=host,security_model=none" \
    "${storage[@]}" -netdev "user,id=net$forward" -device e1000,netdev=net </dev/null >"$share/xen.log" 2>&1 || true
if [ ! -f "$share/job.code" ]; then
    echo "xen lab: the host with $share has not ended its job; its console:" >&2
    tail -n 15 "$share/xen.log" >&2
    exit 1
fi
exit "$(cat "$share/job.code")"
