#!/usr/bin/env bash
# Builds the Linux guest of the whole-system tests: a Debian cloud kernel, and an initramfs with the
# virtio drivers, busybox and the checkers.
#
#   scripts/guest-image.sh OUTDIR      leaves OUTDIR/vmlinuz and OUTDIR/initramfs, and OUTDIR/xen-modules
#
# Idempotent, safe to run from several processes at once, needs no root and no network once the
# kernel is there. Needs busybox-static, cpio and Debian's package lists (scripts/setup.sh).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/packing.sh
. "$root/scripts/packing.sh"

# In the order of their dependencies.
MODULES=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk
    failover net_failover virtio_net virtio_balloon)
# Those of a Xen domain, for tests/xen-lab: not in the initramfs.
XEN_MODULES=(xen-blkfront xen-netfront)

main() {
    if [ $# -ne 1 ]; then
        echo "usage: scripts/guest-image.sh OUTDIR" >&2
        exit 2
    fi
    workshop "$1" lock
    # The kernel changes with these scripts only, the initramfs with what goes into it as well.
    local scripts=("$root/scripts/guest-image.sh" "$root/scripts/packing.sh")
    kernel_stamp=$(cat "${scripts[@]}" | sha256sum)
    is_current "$out/vmlinuz" "$out/kernel.stamp" "$kernel_stamp" || kernel
    stamp=$(cat "${scripts[@]}" "$root/tests/guest/"* "$out/vmlinuz" | sha256sum)
    is_current "$out/initramfs" "$out/initramfs.stamp" "$stamp" || initramfs
}

# Downloads the kernel package and takes the kernel and the modules out of it.
kernel() {
    local metapackage=linux-image-cloud-amd64 package
    package=$(newest_kernel "$metapackage")
    if [ -z "$package" ]; then
        echo "guest image: apt knows no $metapackage; run 'make setup' first" >&2
        exit 1
    fi
    echo "guest image: downloading $package" >&2
    unpack "$work/debs" "$work/kernel" "$package"
    rm -rf "$out/modules" "$out/xen-modules"
    take_modules "$work/kernel" "$work/modules" "${MODULES[@]}"
    take_modules "$work/kernel" "$work/xen-modules" "${XEN_MODULES[@]}"
    mv "$work/modules" "$work/xen-modules" "$out/"
    mv "$work"/kernel/boot/vmlinuz-* "$out/vmlinuz" || lacking "$package has no kernel"
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
    archive "$tree" "$out/initramfs"
    echo "$stamp" >"$out/initramfs.stamp"
}

main "$@"
