#!/usr/bin/env bash
# Packs real programs of Debian for the guest of the benchmarks: redis, sqlite and a C compiler, with the libraries that
# they load and the headers that the compiler reads.
#
#   scripts/guest-programs.sh OUTDIR      leaves OUTDIR/initramfs-programs, OUTDIR/initramfs with these behind it
#
# Idempotent, safe to run from several processes at once, needs no root and no network once it has run. Installs
# nothing: packages are unpacked beside each other.
set -euo pipefail

ROOTS=(redis-server sqlite3 tcc)
PROGRAMS=(usr/bin/redis-server usr/bin/sqlite3 usr/bin/tcc)
LIBRARIES=/lib/x86_64-linux-gnu

main() {
    if [ $# -ne 1 ]; then
        echo "usage: scripts/guest-programs.sh OUTDIR" >&2
        exit 2
    fi
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    "$root/scripts/guest-image.sh" "$1"
    out=$(cd "$1" && pwd)
    exec 9>"$out/programs.lock"
    flock 9
    work=$(mktemp -d "$out/work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    stamp=$(sha256sum <"$root/scripts/guest-programs.sh")
    if [ ! -f "$out/programs.cpio" ] || [ "$(cat "$out/programs.stamp" 2>&1)" != "$stamp" ]; then
        pack
    fi
    stamp=$(cat "$out/programs.stamp" "$out/initramfs.stamp" | sha256sum)
    if [ ! -f "$out/initramfs-programs" ] || [ "$(cat "$out/initramfs-programs.stamp" 2>&1)" != "$stamp" ]; then
        # The kernel unpacks one archive after the other.
        cat "$out/initramfs" "$out/programs.cpio" >"$work/initramfs-programs"
        mv "$work/initramfs-programs" "$out/initramfs-programs"
        echo "$stamp" >"$out/initramfs-programs.stamp"
    fi
}

# Downloads the programs with all that they depend on, and takes out of that what they load.
pack() {
    local names tree=$work/tree unpacked=$work/unpacked deb program
    names=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances "${ROOTS[@]}" libc6-dev linux-libc-dev | grep '^[a-z0-9]' | sort -u |
        grep '^\(lib\|linux-libc-dev\|redis\|sqlite3\|tcc\|lua\)')
    echo "guest programs: downloading $(wc -w <<<"$names") packages" >&2
    mkdir -p "$work/debs" "$unpacked"
    # Names that apt only knows as provided by others are passed over; what is missing shows below.
    (cd "$work/debs" && for name in $names; do
        apt-get -qq -o APT::Sandbox::User="$(id -un)" download "$name" 2>>"$work/apt.log" || true
    done)
    for deb in "$work"/debs/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$unpacked" --no-same-owner --keep-directory-symlink
    done
    mkdir -p "$tree/bin" "$tree/lib64" "$tree$LIBRARIES" "$tree/usr/lib/x86_64-linux-gnu" "$tree/usr/include"
    local loader
    loader=$(find "$unpacked" -name 'ld-linux-x86-64.so.2' -type f | head -n 1)
    cp "$loader" "$tree/lib64/ld-linux-x86-64.so.2"
    for program in "${PROGRAMS[@]}"; do
        # Some are links to others.
        if ! cp -L "$unpacked/$program" "$tree/bin/$(basename "$program")"; then
            echo "guest programs: $program is in none of the packages; apt says:" >&2
            tail -n 5 "$work/apt.log" >&2
            exit 1
        fi
        "$loader" --library-path "$unpacked/lib/x86_64-linux-gnu:$unpacked/usr/lib/x86_64-linux-gnu" \
            --list "$unpacked/$program" >"$work/libraries"
        if grep 'not found' "$work/libraries" >&2; then
            echo "guest programs: $program needs libraries that are in none of the packages; apt says:" >&2
            tail -n 5 "$work/apt.log" >&2
            exit 1
        fi
        sed -n 's/^.* => \(\/[^ ]*\) .*$/\1/p' "$work/libraries" | while read -r library; do
            cp -L "$library" "$tree$LIBRARIES/"
        done
    done
    # What the compiler reads.
    cp -r "$unpacked/usr/include/." "$tree/usr/include/"
    cp -r "$unpacked/usr/lib/x86_64-linux-gnu/tcc" "$tree/usr/lib/x86_64-linux-gnu/"
    (cd "$tree" && find . -print0 | sort -z |
        cpio --quiet --null --create --format=newc --owner=+0:+0) >"$work/programs.cpio"
    mv "$work/programs.cpio" "$out/programs.cpio"
    echo "$stamp" >"$out/programs.stamp"
}

main "$@"
