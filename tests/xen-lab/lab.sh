#!/usr/bin/env bash
# Two real Xen hosts under TCG, joined by an emulated long link: moves a running PVH guest from one to the other with
# `xl migrate` and says what that took. Needs root (network namespaces).
#
#   tests/xen-lab/lab.sh BUILT [LINK]
#
# BUILT is where build.sh puts and finds what is booted; its `result.md` is the table. XEN_LAB_KEEP=1 keeps the shares of both
# hosts, with all logs.
set -euo pipefail

LINK=${2:-delay 25ms rate 200mbit loss 0.5% limit 50ms}
LIMIT=${LIMIT:-900}

main() {
    lab=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    mkdir -p "$1"
    built=$(cd "$1" && pwd)
    hybridmig=$lab/../../target/release/hybridmig
    step "building" "$lab/build.sh" "$built" "${XEN_LAB_HYPERVISOR:-paging}"
    shares=$(mktemp -d "$built/run.XXXXXX")
    trap leave EXIT
    for host in near far; do
        mkdir -p "$shares/$host/console"
        cp "$lab/jobs/$host" "$shares/$host/job"
        cp "$built/guest-vmlinuz" "$built/guest.cpio" "$shares/$host/"
    done
    # One clock for both consoles: this machine's.
    watchers=()
    for host in near far; do
        stamp "$shares/$host" &
        watchers+=($!)
    done
    echo "xen lab: moving the guest over: $LINK" >&2
    export LIMIT
    # The far host waits longer than the near one works, and ends with it.
    "$hybridmig" netem run "$LINK" --far "$lab/host.sh '$built' '$shares/far' 8002 8003" -- \
        "$lab/host.sh" "$built" "$shares/near" >"$shares/netem.log" 2>&1 || failed "the hosts" "$shares/netem.log"
    for watcher in "${watchers[@]}"; do
        kill "$watcher" 2>/dev/null || true
    done
    python3 "$lab/result.py" "$shares" "$LINK" | tee "$built/result.md"
}

step() {
    local name=$1
    shift
    "$@" || failed "$name" /dev/null
}

failed() {
    echo "xen lab: $1 failed; the end of the log:" >&2
    tail -n 20 "$2" >&2
    for host in near far; do
        if [ -f "${shares:-/nowhere}/$host/job.log" ]; then
            echo "--- $host" >&2
            tail -n 10 "$shares/$host/job.log" >&2
        fi
    done
    exit 1
}

# Lines of every console, and the phases, with the time at which they came, until killed.
stamp() {
    exec python3 "$lab/stamp.py" "$1"
}

leave() {
    local pid
    for pid in "${watchers[@]:-}"; do
        if [ -n "$pid" ]; then
            kill "$pid" 2>/dev/null || true
        fi
    done
    if [ "${XEN_LAB_KEEP:-0}" = 1 ]; then
        echo "xen lab: logs are in $shares" >&2
    else
        rm -rf "$shares"
    fi
}

main "$@"
