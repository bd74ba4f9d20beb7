#!/usr/bin/env bash
# Builds what the Xen lab boots, from Debian's packages and Debian's source of Xen alone.
#
#   tests/xen-lab/build.sh OUTDIR [PART…]
#
# PARTs are `paging`, a hypervisor with memory paging (some minutes), and `hvm`, what HVM guests need.
#
# OUTDIR/xen             Debian's hypervisor
# OUTDIR/xen-paging      the same, of Debian's source, with memory paging
# OUTDIR/dom0-vmlinuz    dom0's kernel
# OUTDIR/dom0.cpio       dom0's root: the toolstack, busybox, tests/xen-lab/dom0
# OUTDIR/hvm.tar         what dom0 needs beside it for HVM guests: QEMU, firmware
# OUTDIR/guest-vmlinuz   the PVH guest's kernel, and
# OUTDIR/guest.cpio      its root, with the memory checker of tests/guest
#
# Each part is made again only when what it is made of has changed. Needs no root; installs nothing.
set -euo pipefail

lab=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$lab/../.." && pwd)
# shellcheck source=scripts/packing.sh
. "$root/scripts/packing.sh"

# The toolstack, what its programs load, and what carries `xl migrate` where ssh would.
PACKAGES=(xen-hypervisor-4.17-amd64 xen-utils-4.17 xen-utils-common xenstore-utils socat)
# The device model of HVM guests, and its firmware.
HVM_PACKAGES=(qemu-system-xen qemu-system-data seabios)
# What dom0 runs; `xen` is where Debian keeps the version's own programs.
PROGRAMS=(usr/lib/xen-4.17/bin/xl usr/lib/xen-4.17/bin/xen-init-dom0 usr/lib/xen-4.17/bin/xenconsoled
    usr/lib/xen-4.17/bin/xenstored usr/lib/xen-4.17/bin/libxl-save-helper usr/lib/xen-4.17/bin/xenconsole
    usr/bin/xenstore-ls usr/bin/xenstore-read usr/bin/xenstore-write usr/bin/socat)
# In the order of their dependencies; a name that the kernel has built in is passed over.
MODULES=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci netfs fscache 9pnet 9pnet_virtio 9p
    e1000 xen-privcmd xenfs xen-gntdev xen-gntalloc xen-evtchn loop llc stp bridge xen-blkback
    xen-netback)
# The newest source that the mirrors have and that was tried. The packages' tools work on it.
SOURCE=xen=4.17.5+72-g01140da4e8-1

main() {
    if [ $# -lt 1 ]; then
        echo "usage: tests/xen-lab/build.sh OUTDIR [paging] [hvm]" >&2
        exit 2
    fi
    workshop "$1" lock
    shift
    part packages "${PACKAGES[*]}"
    part dom0 "${PROGRAMS[*]} ${MODULES[*]}" "$out/packages.stamp" "$lab"/dom0/init "$lab"/dom0/scripts/*
    part guest '' "$root/scripts/guest-image.sh" "$root"/tests/guest/* "$lab/guest-init"
    local name
    for name in "$@"; do
        case $name in
            paging) part hypervisor "$SOURCE" ;;
            hvm) part hvm "${HVM_PACKAGES[*]}" "$out/packages.stamp" ;;
            *) echo "xen lab: no part $name" >&2 && exit 2 ;;
        esac
    done
}

# Makes the part $1 unless what it is made of (the names $2, the files that follow, and these scripts) is what it was.
part() {
    local name=$1 names=$2 stamp
    shift 2
    stamp=$(cat "$root/scripts/packing.sh" "$@" <(declare -f "make_$name") <(echo "$names") | sha256sum)
    if is_current "$out/$name.stamp" "$out/$name.stamp" "$stamp"; then
        return
    fi
    echo "xen lab: making $name" >&2
    rm -f "$out/$name.stamp"
    # Not in a condition: there a step that fails would not end it.
    set +e
    (set -e && trap - EXIT && "make_$name") 2>"$work/$name.log"
    local code=$?
    set -e
    if [ $code != 0 ]; then
        echo "xen lab: $name failed; the end of what it said:" >&2
        tail -n 30 "$work/$name.log" >&2
        exit 1
    fi
    echo "$stamp" >"$out/$name.stamp"
}

# Downloads the toolstack and dom0's kernel.
make_packages() {
    local names kernel
    apt-cache show "${PACKAGES[@]}" >/dev/null || {
        echo "apt does not know ${PACKAGES[*]}; are its lists there? apt-get update" >&2
        return 1
    }
    rm -rf "$out/unpacked"
    names=$(closure "${PACKAGES[@]}" | grep '^\(lib\|xen\|zlib\|socat\)')
    # shellcheck disable=SC2086
    unpack "$work/debs" "$work/unpacked" $names
    kernel=$(newest_kernel linux-image-amd64)
    unpack "$work/kernel" "$work/unpacked" "$kernel"
    gunzip -c "$work"/unpacked/boot/xen-4.17-amd64.gz >"$out/xen"
    cp "$work"/unpacked/boot/vmlinuz-* "$out/dom0-vmlinuz"
    mv "$work/unpacked" "$out/unpacked"
}

# The root of dom0.
make_dom0() {
    local tree=$work/dom0 unpacked=$out/unpacked
    mkdir -p "$tree"/{bin,sbin,dev,proc,sys,run,tmp,var/lib/xen,var/lib/xenstored,var/log/xen/console,etc/xen,modules,usr/lib}
    cp "$(command -v busybox)" "$tree/bin/busybox"
    cp "$lab/dom0/init" "$tree/"
    ln -s ../run "$tree/var/run"
    chmod 755 "$tree/init"
    # xl complains without one.
    touch "$tree/etc/xen/xl.conf"
    KEEP_PATHS=1 take_programs "$unpacked" "$tree" "${PROGRAMS[@]}"
    # Opened at run time, for threads that end; and what hybridmig loads beside Xen's libraries.
    cp -L "$unpacked"/lib/x86_64-linux-gnu/{libgcc_s.so.1,libm.so.6} "$tree/lib/x86_64-linux-gnu/"
    # Debian's own want bash.
    mkdir "$tree/etc/xen/scripts"
    cp "$lab"/dom0/scripts/* "$tree/etc/xen/scripts/"
    chmod 755 "$tree"/etc/xen/scripts/*
    take_modules "$unpacked" "$tree/modules" "${MODULES[@]}"
    archive "$tree" "$out/dom0.cpio"
}

# The guest: the kernel of the other test guest, which starts under Xen by PVH as well, and its root with another init.
make_guest() {
    local tree=$work/guest
    "$root/scripts/guest-image.sh" "$out/guest-image" >&2
    cp "$out/guest-image/vmlinuz" "$out/guest-vmlinuz"
    mkdir -p "$tree"
    cp "$lab/guest-init" "$tree/init"
    chmod 755 "$tree/init"
    cp -r "$out/guest-image/xen-modules" "$tree/"
    archive "$tree" "$work/overlay"
    # The kernel unpacks one archive after the other.
    cat "$out/guest-image/initramfs" "$work/overlay" >"$work/guest.cpio"
    mv "$work/guest.cpio" "$out/guest.cpio"
}

# QEMU as Xen's device model, with what it and hvmloader load.
make_hvm() {
    local tree=$work/hvm unpacked=$out/unpacked names name
    names=$(closure "${HVM_PACKAGES[@]}" | grep '^lib')
    # shellcheck disable=SC2086
    unpack "$work/debs" "$work/unpacked" "${HVM_PACKAGES[@]}" $names
    KEEP_PATHS=1 take_programs "$work/unpacked" "$tree" usr/libexec/xen-qemu-system-i386
    mkdir -p "$tree"/usr/share/{qemu/keymaps,seabios} "$tree/usr/lib/xen-4.17/boot"
    for name in linuxboot_dma.bin linuxboot.bin kvmvapic.bin keymaps/en-us; do
        cp -L "$work/unpacked/usr/share/qemu/$name" "$tree/usr/share/qemu/$name"
    done
    cp -L "$work/unpacked/usr/share/seabios/bios-256k.bin" "$tree/usr/share/seabios/"
    cp "$unpacked/usr/lib/xen-4.17/boot/hvmloader" "$tree/usr/lib/xen-4.17/boot/"
    tar -C "$tree" -cf "$work/hvm.tar" .
    mv "$work/hvm.tar" "$out/hvm.tar"
}

# Debian's hypervisor with memory paging.
make_hypervisor() {
    local apt=$work/apt tree
    mkdir -p "$apt/lists/partial" "$apt/cache"
    # Sources need lists of their own, whatever this machine's are.
    echo "deb-src http://deb.debian.org/debian bookworm main
deb-src http://deb.debian.org/debian bookworm-updates main
deb-src http://security.debian.org/debian-security bookworm-security main" >"$apt/sources.list"
    local options=(-o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o "APT::Sandbox::User=$(id -un)")
    apt-get -qq "${options[@]}" update >&2
    (cd "$work" && apt-get -qq "${options[@]}" source --download-only "$SOURCE") >&2
    (cd "$work" && dpkg-source --extract xen_*.dsc xen-source) >&2
    tree=$work/xen-source/xen
    cp "$work/xen-source/debian/xen-kconfig" "$tree/.config"
    printf 'CONFIG_EXPERT=y\nCONFIG_UNSUPPORTED=y\nCONFIG_MEM_PAGING=y\n' >>"$tree/.config"
    make -C "$tree" olddefconfig >&2
    # A name that has changed would be dropped silently.
    grep -q '^CONFIG_MEM_PAGING=y' "$tree/.config"
    make -C "$tree" -j2 XEN_TARGET_ARCH=x86_64 build >&2
    gunzip -c "$tree/xen.gz" >"$out/xen-paging"
}

main "$@"
