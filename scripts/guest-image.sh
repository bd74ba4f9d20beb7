#!/usr/bin/env bash
# Builds the Linux guest of the whole-system tests: a Debian cloud kernel, and an initramfs with the
# virtio drivers, busybox and the checkers.
#
#   scripts/guest-image.sh OUTDIR      leaves OUTDIR/vmlinuz and OUTDIR/initramfs
#
# Idempotent, safe to run from several processes at once, needs no root and no network once the
# kernel is there. Needs busybox-static, cpio and Debian's package lists (scripts/setup.sh).
set -euo pipefail

# In the order of their dependencies.
MODULES=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk
    failover net_failover virtio_net virtio_balloon)

main() {
    if [ $# -ne 1 ]; then
        echo "usage: scripts/guest-image.sh OUTDIR" >&2
        exit 2
    fi
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    mkdir -p "$1"
    out=$(cd "$1" && pwd)
    exec 9>"$out/lock"
    flock 9
    work=$(mktemp -d "$out/work.XXXXXX")
    trap 'rm -rf "$work"' EXIT

    # The kernel changes with this script only, the initramfs with what goes into it as well.
    kernel_stamp=$(sha256sum <"$root/scripts/guest-image.sh")
    if [ ! -f "$out/vmlinuz" ] || [ "$(cat "$out/kernel.stamp" 2>&1)" != "$kernel_stamp" ]; then
        kernel
    fi
    stamp=$(cat "$root/scripts/guest-image.sh" "$root/tests/guest/"* "$out/vmlinuz" | sha256sum)
    if [ ! -f "$out/initramfs" ] || [ "$(cat "$out/initramfs.stamp" 2>&1)" != "$stamp" ]; then
        initramfs
    fi
}

# Downloads the kernel package and takes the kernel and the modules out of it.
kernel() {
    local metapackage=linux-image-cloud-amd64 package deb
    package=$(apt-cache depends "$metapackage" |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
    if [ -z "$package" ]; then
        echo "guest image: apt knows no $metapackage; run 'make setup' first" >&2
        exit 1
    fi
    echo "guest image: downloading $package" >&2
    # As root apt would otherwise try, and complain, to drop to a user who may not write here.
    (cd "$work" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download "$package") || {
        echo "guest image: apt cannot download $package; are its lists old? 'apt-get update'" >&2
        exit 1
    }
    deb=$(find "$work" -name '*.deb')
    mkdir "$work/kernel"
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$work/kernel" --no-same-owner --wildcards \
        './boot/vmlinuz-*' './lib/modules/*'

    rm -rf "$out/modules"
    mkdir "$work/modules"
    local module path
    for module in "${MODULES[@]}"; do
        path=$(find "$work/kernel/lib/modules" -name "$module.ko")
        if [ -n "$path" ]; then
            cp "$path" "$work/modules/"
            echo "$module" >>"$work/modules/order"
        elif ! grep -q "/$module.ko$" "$work"/kernel/lib/modules/*/modules.builtin; then
            echo "guest image: $package has no module $module" >&2
            exit 1
        fi
    done
    mv "$work/modules" "$out/modules"
    mv "$work"/kernel/boot/vmlinuz-* "$out/vmlinuz"
    echo "$kernel_stamp" >"$out/kernel.stamp"
}

# Compiles the checkers and packs them.
initramfs() {
    local busybox tree=$work/tree
    busybox=$(command -v busybox) || {
        echo "guest image: busybox is missing; run 'make setup' first" >&2
        exit 1
    }
    # The guest has no libraries.
    if ldd "$busybox" >/dev/null 2>&1; then
        echo "guest image: $busybox is not static; install busybox-static" >&2
        exit 1
    fi
    command -v cpio >/dev/null || {
        echo "guest image: cpio is missing; run 'make setup' first" >&2
        exit 1
    }
    echo "guest image: building the initramfs" >&2
    mkdir -p "$tree"/{bin,dev,proc,sys}
    cp "$busybox" "$tree/bin/busybox"
    cp -r "$out/modules" "$tree/modules"
    cp "$root/tests/guest/init" "$tree/init"
    chmod 755 "$tree/init" "$tree/bin/busybox"
    local checker
    for checker in memcheck diskcheck realwork; do
        "${RUSTC:-rustc}" --edition 2024 -O -C target-feature=+crt-static -C strip=symbols \
            -C panic=abort -o "$tree/bin/$checker" "$root/tests/guest/$checker.rs"
    done
    # Not compressed: the guest would unpack it on an emulated CPU.
    (cd "$tree" && find . -print0 | sort -z |
        cpio --quiet --null --create --format=newc --owner=+0:+0) >"$work/initramfs"
    mv "$work/initramfs" "$out/initramfs"
    echo "$stamp" >"$out/initramfs.stamp"
}

main "$@"
