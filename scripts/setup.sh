#!/usr/bin/env bash
# Installs what building and testing need and is missing; changes nothing else.
#
#   scripts/setup.sh build|test|xen|xen-lab…
#
# Debian 12 or newer. Uses sudo where it is not run as root. Quick, quiet and without network when
# nothing is missing.
set -euo pipefail

RUST_MINIMUM=1.88
BUILD_PACKAGES=(build-essential pkg-config libclang-dev ca-certificates)
TEST_PACKAGES=(qemu-system-x86 qemu-utils libnbd-bin busybox-static cpio iproute2 e2fsprogs)
XEN_PACKAGES=(libxen-dev)
XEN_LAB_PACKAGES=(qemu-system-x86 busybox-static cpio flex bison dpkg-dev bc python3)
# Not installed, only taken apart: the kernel of the test guest.
KERNEL=linux-image-cloud-amd64

main() {
    local packages=() part tests=no
    for part in "$@"; do
        case $part in
            build) packages+=("${BUILD_PACKAGES[@]}") ;;
            test) packages+=("${TEST_PACKAGES[@]}") tests=yes ;;
            xen) packages+=("${XEN_PACKAGES[@]}") ;;
            xen-lab) packages+=("${XEN_LAB_PACKAGES[@]}") ;;
            *) fail "usage: scripts/setup.sh build|test|xen|xen-lab…" ;;
        esac
    done
    check_rust "$tests"
    install_packages "$tests" "${packages[@]}"
    if [ "$tests" = yes ] && ! cargo nextest --version >/dev/null 2>&1; then
        say "installing cargo-nextest (compiles for some minutes, once)"
        cargo install --locked cargo-nextest
    fi
}

install_packages() {
    local tests=$1 missing=() lost=()
    shift
    mapfile -t missing < <(lacking "$@")
    local lists=present
    if [ "$tests" = yes ] && ! knows_kernel; then
        lists=missing
    fi
    if [ ${#missing[@]} -eq 0 ] && [ $lists = present ]; then
        return
    fi
    command -v apt-get >/dev/null ||
        fail "this is not a Debian system; install the like of: ${missing[*]}"
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null ||
            fail "as root, run: apt-get update && apt-get install ${missing[*]}"
        as_root=(sudo)
    fi
    say "updating apt's package lists"
    "${as_root[@]}" apt-get -qq update
    if [ ${#missing[@]} -gt 0 ]; then
        apt_install "${missing[@]}"
        # One that came from elsewhere (backports, say), and does not go with these, has been removed for them.
        mapfile -t lost < <(lacking "$@")
        if [ ${#lost[@]} -gt 0 ]; then
            apt_install "${lost[@]}"
        fi
        mapfile -t lost < <(lacking "$@")
        [ ${#lost[@]} -eq 0 ] || fail "apt does not install ${lost[*]} beside the others; see what it says of them"
    fi
    if [ "$tests" = yes ] && ! knows_kernel; then
        fail "apt offers no $KERNEL, which the test guest boots; add Debian's main suite to its sources"
    fi
}

# Those of the packages that are not installed.
lacking() {
    local package
    for package in "$@"; do
        installed "$package" || echo "$package"
    done
}

# Uses the caller's `as_root`.
apt_install() {
    say "installing $*"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install --yes --no-install-recommends "$@" >/dev/null
}

installed() {
    local status
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null) || return 1
    [ "$status" = installed ]
}

knows_kernel() {
    apt-cache show "$KERNEL" >/dev/null 2>&1
}

check_rust() {
    local tests=$1 version
    if ! command -v cargo >/dev/null; then
        fail "cargo is missing, and Debian 12's is too old. Install Rust $RUST_MINIMUM or newer with
rustup, as https://rustup.rs says, and run this again"
    fi
    version=$(cargo --version | cut -d ' ' -f 2)
    if [ "$(printf '%s\n' "$RUST_MINIMUM" "$version" | sort -V | head -n 1)" != "$RUST_MINIMUM" ]; then
        fail "$(command -v cargo) is version $version; $RUST_MINIMUM or newer is needed. With rustup: rustup update"
    fi
    if [ "$tests" = yes ]; then
        local component
        for component in fmt clippy; do
            if ! cargo "$component" --version >/dev/null 2>&1; then
                fail "cargo $component is missing. With rustup: rustup component add rustfmt clippy"
            fi
        done
    fi
}

say() {
    echo "setup: $*" >&2
}

fail() {
    say "$*"
    exit 1
}

main "$@"
