#!/usr/bin/env bash
# Builds what the Xen lab boots, from Debian's packages and Debian's source of Xen alone.
#
#   tests/xen-lab/build.sh OUTDIR [stock|paging]     `paging`, the default, builds the hypervisor as well: some minutes
#
# OUTDIR/xen             Debian's hypervisor
# OUTDIR/xen-paging      the same, of Debian's source, with memory paging
# OUTDIR/dom0-vmlinuz    dom0's kernel
# OUTDIR/dom0.cpio       dom0's root: the toolstack, busybox, tests/xen-lab/dom0
# OUTDIR/guest-vmlinuz   the PVH guest's kernel, and
# OUTDIR/guest.cpio      its root, with the memory checker of tests/guest
#
# Each part is made again only when what it is made of has changed. Needs no root; installs nothing.
set -euo pipefail

# The toolstack, and what its programs load.
PACKAGES=(xen-hypervisor-4.17-amd64 xen-utils-4.17 xen-utils-common xenstore-utils)
# What dom0 runs; `xen` is where Debian keeps the version's own programs.
PROGRAMS=(usr/lib/xen-4.17/bin/xl usr/lib/xen-4.17/bin/xen-init-dom0 usr/lib/xen-4.17/bin/xenconsoled
    usr/lib/xen-4.17/bin/xenstored usr/lib/xen-4.17/bin/libxl-save-helper usr/lib/xen-4.17/bin/xenconsole
    usr/bin/xenstore-ls usr/bin/xenstore-read usr/bin/xenstore-write)
# In the order of their dependencies; a name that the kernel has built in is passed over.
MODULES=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci netfs fscache 9pnet 9pnet_virtio 9p e1000
    xen-privcmd xenfs xen-gntdev xen-gntalloc xen-evtchn)
# The newest source that the mirrors have and that was tried. The packages' tools work on it.
SOURCE=xen=4.17.5+72-g01140da4e8-1
LIBRARIES=lib/x86_64-linux-gnu

main() {
    if [ $# -lt 1 ] || [ $# -gt 2 ]; then
        echo "usage: tests/xen-lab/build.sh OUTDIR [stock|paging]" >&2
        exit 2
    fi
    lab=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    root=$(cd "$lab/../.." && pwd)
    mkdir -p "$1"
    out=$(cd "$1" && pwd)
    exec 9>"$out/lock"
    flock 9
    work=$(mktemp -d "$out/work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    part packages /dev/null
    part dom0 "$lab"/dom0/*
    part guest "$root/scripts/guest-image.sh" "$root"/tests/guest/*
    if [ "${2:-paging}" = paging ]; then
        part hypervisor /dev/null
    fi
}

# Makes a part unless what it is made of is what it was.
part() {
    local name=$1 stamp
    shift
    stamp=$( (declare -f "make_$name" closure unpack libraries archive; printf "%s " "${PACKAGES[@]}" "${PROGRAMS[@]}" "${MODULES[@]}" "$SOURCE"; cat "$@") | sha256sum)
    if [ "$(cat "$out/$name.stamp" 2>&1)" = "$stamp" ]; then
        return
    fi
    echo "xen lab: making $name" >&2
    rm -f "$out/$name.stamp"
    # Not in a condition: there a step that fails would not end it.
    set +e
    (set -e && "make_$name") 2>"$work/$name.log"
    local code=$?
    set -e
    if [ $code != 0 ]; then
        echo "xen lab: $name failed; the end of what it said:" >&2
        tail -n 30 "$work/$name.log" >&2
        exit 1
    fi
    echo "$stamp" >"$out/$name.stamp"
}

# Names of packages with all that they depend on, as far as apt knows them.
closure() {
    apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances "$@" |
        grep '^[a-z0-9]' | sort -u
}

# Downloads packages into a folder and unpacks them into another.
unpack() {
    local debs=$1 into=$2 name deb
    shift 2
    mkdir -p "$debs" "$into"
    for name in "$@"; do
        # Names that apt only knows as provided by others fail; what is missing in the end is seen then.
        (cd "$debs" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download "$name" 2>&1) || true
    done >&2
    for deb in "$debs"/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$into" --no-same-owner --keep-directory-symlink
    done
}

# Downloads the toolstack and dom0's kernel.
make_packages() {
    local names kernel
    apt-cache show "${PACKAGES[@]}" >/dev/null || {
        echo "apt does not know ${PACKAGES[*]}; are its lists there? apt-get update" >&2
        return 1
    }
    rm -rf "$out/unpacked"
    names=$(closure "${PACKAGES[@]}" | grep '^\(lib\|xen\|zlib\)')
    # shellcheck disable=SC2086
    unpack "$work/debs" "$work/unpacked" $names
    kernel=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
    unpack "$work/kernel" "$work/unpacked" "$kernel"
    gunzip -c "$work"/unpacked/boot/xen-4.17-amd64.gz >"$out/xen"
    cp "$work"/unpacked/boot/vmlinuz-* "$out/dom0-vmlinuz"
    mv "$work/unpacked" "$out/unpacked"
}

# The root of dom0.
make_dom0() {
    local tree=$work/dom0 unpacked=$out/unpacked program module path loader
    mkdir -p "$tree"/{bin,sbin,dev,proc,sys,run,tmp,var/lib/xen,var/lib/xenstored,var/log/xen/console,etc/xen,modules,usr/lib,lib64} \
        "$tree/$LIBRARIES"
    cp "$(command -v busybox)" "$tree/bin/busybox"
    cp "$lab"/dom0/* "$tree/"
    ln -s ../run "$tree/var/run"
    chmod 755 "$tree/init"
    loader=$(find "$unpacked" -name 'ld-linux-x86-64.so.2' -type f | head -n 1)
    cp "$loader" "$tree/lib64/ld-linux-x86-64.so.2"
    mkdir -p "$tree/usr/lib/xen-4.17/bin"
    for program in "${PROGRAMS[@]}"; do
        mkdir -p "$tree/$(dirname "$program")"
        cp -L "$unpacked/$program" "$tree/$program"
        libraries "$loader" "$unpacked" "$unpacked/$program" "$tree/$LIBRARIES"
    done
    # Opened at run time: for threads that end.
    cp -L "$unpacked/$LIBRARIES/libgcc_s.so.1" "$tree/$LIBRARIES/"
    cp -r "$unpacked/etc/xen/scripts" "$tree/etc/xen/"
    for module in "${MODULES[@]}"; do
        path=$(find "$unpacked/lib/modules" -name "$module.ko" | head -n 1)
        if [ -n "$path" ]; then
            cp "$path" "$tree/modules/"
            echo "$module" >>"$tree/modules/order"
        elif ! grep -q "/$module.ko$" "$unpacked"/lib/modules/*/modules.builtin; then
            echo "dom0's kernel has no module $module" >&2
            return 1
        fi
    done
    archive "$tree" "$out/dom0.cpio"
}

# Copies the libraries that a program loads.
libraries() {
    local loader=$1 from=$2 program=$3 to=$4 found
    found=$("$loader" --library-path "$from/$LIBRARIES:$from/usr/$LIBRARIES:$from/usr/lib/xen-4.17/lib/x86_64-linux-gnu" --list "$program") || {
        # A static program has none.
        return 0
    }
    if grep 'not found' <<<"$found" >&2; then
        echo "$program needs libraries that are in none of the packages" >&2
        return 1
    fi
    sed -n 's/^.* => \(\/[^ ]*\) .*$/\1/p' <<<"$found" | while read -r library; do
        cp -L "$library" "$to/"
    done
}

archive() {
    (cd "$1" && find . -print0 | sort -z | cpio --quiet --null --create --format=newc --owner=+0:+0) >"$work/archive"
    mv "$work/archive" "$2"
}

# The guest: the kernel of the other test guest, which starts under Xen by PVH as well, and the same memory checker.
make_guest() {
    local tree=$work/guest
    "$root/scripts/guest-image.sh" "$out/guest-image" >&2
    cp "$out/guest-image/vmlinuz" "$out/guest-vmlinuz"
    mkdir -p "$tree"/{bin,dev,proc,sys}
    cp "$(command -v busybox)" "$tree/bin/busybox"
    "${RUSTC:-rustc}" --edition 2024 -O -C target-feature=+crt-static -C strip=symbols -C panic=abort \
        -o "$tree/bin/memcheck" "$root/tests/guest/memcheck.rs" >&2
    cat >"$tree/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox stty -F /dev/hvc0 -echo
exec /bin/memcheck </dev/hvc0 >/dev/hvc0 2>&1
INIT
    chmod 755 "$tree/init" "$tree/bin/busybox"
    archive "$tree" "$out/guest.cpio"
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
