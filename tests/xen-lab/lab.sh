#!/usr/bin/env bash
# Two real Xen hosts under TCG, joined by an emulated long link: moves running guests from one to the other, with
# `xl migrate` and with hybridmig, and says what that took. Needs root (network namespaces).
#
#   tests/xen-lab/lab.sh BUILT [more]      `more`: other guests, and other troubles
#
# BUILT is where build.sh puts and finds what is booted; its `result.md` (`result-more.md`) is the table. MOVES replaces
# the list of what is done, LINK the link. XEN_LAB_KEEP=1 keeps the shares of both hosts, with all logs. XEN_NEAR and
# XEN_FAR pick a hypervisor, `xen` or `xen-paging`. HYBRIDMIG is the program, built with `--features xen`.
#
# TCP, which `xl migrate` takes, ends at both hosts of QEMU's user network, outside of Xen: its congestion control is BBR
# here, with which it is at its best, or what TCP says.
set -euo pipefail

LINK=${LINK:-delay 25ms rate 200mbit loss 0.5% limit 50ms}
export STORAGE LIMIT=${LIMIT:-1200}
# Name of the guest, way, and what `send` is given.
USUAL='xl xl
precopy hybridmig --mode precopy --max-downtime 3s
hybrid hybridmig --mode hybrid
postcopy hybridmig --mode postcopy
killed killed --mode postcopy
cut cut --mode precopy --rate-limit 20mbit'
MORE='smp smp --mode hybrid
hvm hvm --mode hybrid
hvmpost hvm --mode postcopy
devices devices --mode hybrid --disk all=skip
devicespost devices --mode postcopy --disk all=skip
balloon balloon --mode hybrid
again again --mode hybrid
resolve resolve --mode postcopy'

main() {
    lab=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    mkdir -p "$1"
    built=$(cd "$1" && pwd)
    hybridmig=${HYBRIDMIG:-$lab/../../target/release/hybridmig}
    local hvm=
    case ${2:-} in
        '') MOVES=${MOVES:-$USUAL} ;;
        more) MOVES=${MOVES:-$MORE} ;;
        *) echo "usage: tests/xen-lab/lab.sh BUILT [more]" >&2 && exit 2 ;;
    esac
    if grep -q '^[^ ]* hvm' <<<"$MOVES"; then
        hvm=hvm
    fi
    "$lab/build.sh" "$built" paging $hvm
    local result=$built/result${2:+-$2}.md
    shares=$(mktemp -d "$built/run.XXXXXX")
    STORAGE=$shares/storage
    watchers=()
    trap leave EXIT
    for host in near far; do
        mkdir -p "$shares/$host"/{console,bin}
        cp "$lab/jobs/$host" "$shares/$host/job"
        cp "$built/guest-vmlinuz" "$built/guest.cpio" "$shares/$host/"
        if [ -n "$hvm" ]; then
            ln "$built/hvm.tar" "$shares/$host/"
        fi
        strip -o "$shares/$host/bin/hybridmig" "$hybridmig"
        "$hybridmig" keys new --identity "$shares/$host/$host.pem" >/dev/null
    done
    cp "$lab/jobs/far-answers" "$shares/far/"
    mkdir "$shares/storage"
    truncate -s 16M "$shares/storage/disk.img"
    echo "$MOVES" >"$shares/near/moves"
    "$hybridmig" keys show --identity "$shares/near/near.pem" >"$shares/far/near.fingerprint"
    "$hybridmig" keys show --identity "$shares/far/far.pem" >"$shares/near/far.fingerprint"
    # One clock for both hosts: this machine's.
    for host in near far; do
        python3 "$lab/stamp.py" "$shares/$host" &
        watchers+=($!)
    done
    echo "xen lab: moving guests over: $LINK" >&2
    local tcp="echo ${TCP:-bbr} >/proc/sys/net/ipv4/tcp_congestion_control"
    # The near host runs Debian's own hypervisor: a source needs no other.
    local near="XEN=${XEN_NEAR:-xen} $lab/host.sh '$built' '$shares/near'"
    # Both hosts end by themselves: the near one when all is done, the far one when it is told.
    "$hybridmig" netem run "$LINK" --far "$tcp && XEN=${XEN_FAR:-xen-paging} exec $lab/host.sh '$built' '$shares/far' 8002 8003 4433" -- \
        bash -c "$tcp && $near" >"$shares/netem.log" 2>&1 || failed "a host, or one of its moves," "$shares/netem.log"
    python3 "$lab/result.py" "$shares" "$LINK" >"$result" || failed "a check of the result" "$result"
    cat "$result"
}

failed() {
    echo "xen lab: $1 failed; the end of the log:" >&2
    tail -n 20 "$2" >&2
    local log
    for log in "$shares"/{near,far}/*.log; do
        if [ -f "$log" ]; then
            echo "--- $(basename "$(dirname "$log")")/$(basename "$log")" >&2
            tail -n "${XEN_LAB_TAIL:-10}" "$log" | cut -c 1-400 >&2
        fi
    done
    exit 1
}

leave() {
    local pid
    for pid in "${watchers[@]}"; do
        kill "$pid" 2>/dev/null || true
    done
    if [ "${XEN_LAB_KEEP:-0}" = 1 ]; then
        echo "xen lab: logs are in $shares" >&2
    else
        rm -rf "$shares"
    fi
}

main "$@"
