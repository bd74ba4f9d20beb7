#!/usr/bin/env bash
# Records what Xen's own toolstack writes of a PVH domain, without the pages: what the unit tests of the stream compare
# with.
#
#   tests/xen-lab/record.sh BUILT FILE
set -euo pipefail

lab=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$lab/build.sh" "$1"
built=$(cd "$1" && pwd)
share=$(mktemp -d "$built/run.XXXXXX")
trap 'rm -rf "$share"' EXIT
cp "$lab/jobs/record" "$share/job"
cp "$built/guest-vmlinuz" "$built/guest.cpio" "$share/"
XEN=xen LIMIT=200 "$lab/host.sh" "$built" "$share" || {
    cat "$share/job.log" >&2
    exit 1
}
python3 "$lab/strip.py" "$share/saved" "$2"
