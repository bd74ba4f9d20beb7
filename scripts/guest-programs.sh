#!/usr/bin/env bash
# Packs real programs of Debian for the guest of the benchmarks: redis, sqlite and a C compiler, with the libraries that
# they load and the headers that the compiler reads.
#
#   scripts/guest-programs.sh OUTDIR      leaves OUTDIR/initramfs-programs, OUTDIR/initramfs with these behind it
#
# Idempotent, safe to run from several processes at once, needs no root and no network once it has run. Installs
# nothing: packages are unpacked beside each other.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/packing.sh
. "$root/scripts/packing.sh"

ROOTS=(redis-server sqlite3 tcc)
PROGRAMS=(usr/bin/redis-server usr/bin/sqlite3 usr/bin/tcc)

main() {
    if [ $# -ne 1 ]; then
        echo "usage: scripts/guest-programs.sh OUTDIR" >&2
        exit 2
    fi
    "$root/scripts/guest-image.sh" "$1"
    workshop "$1" programs.lock
    stamp=$(cat "$root/scripts/guest-programs.sh" "$root/scripts/packing.sh" | sha256sum)
    is_current "$out/programs.cpio" "$out/programs.stamp" "$stamp" || pack
    stamp=$(cat "$out/programs.stamp" "$out/initramfs.stamp" | sha256sum)
    if ! is_current "$out/initramfs-programs" "$out/initramfs-programs.stamp" "$stamp"; then
        # The kernel unpacks one archive after the other.
        cat "$out/initramfs" "$out/programs.cpio" >"$work/initramfs-programs"
        mv "$work/initramfs-programs" "$out/initramfs-programs"
        echo "$stamp" >"$out/initramfs-programs.stamp"
    fi
}

# Downloads the programs with all that they depend on, and takes out of that what they load.
pack() {
    local names tree=$work/tree unpacked=$work/unpacked
    names=$(closure "${ROOTS[@]}" libc6-dev linux-libc-dev | grep '^\(lib\|linux-libc-dev\|redis\|sqlite3\|tcc\|lua\)')
    echo "guest programs: downloading $(wc -w <<<"$names") packages" >&2
    # shellcheck disable=SC2086
    unpack "$work/debs" "$unpacked" $names
    take_programs "$unpacked" "$tree" "${PROGRAMS[@]}"
    mkdir -p "$tree/usr/lib/x86_64-linux-gnu" "$tree/usr/include"
    # What the compiler reads.
    cp -r "$unpacked/usr/include/." "$tree/usr/include/"
    cp -r "$unpacked/usr/lib/x86_64-linux-gnu/tcc" "$tree/usr/lib/x86_64-linux-gnu/"
    archive "$tree" "$out/programs.cpio"
    echo "$stamp" >"$out/programs.stamp"
}

main "$@"
