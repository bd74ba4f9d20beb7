#!/usr/bin/env bash
# Unpacks QEMU 10 beside the installed QEMU, for the peers of the bench: QEMU 7.2 loses guests under TCG
# in its own long pre-copies.
#
#   scripts/qemu10.sh OUTDIR      leaves OUTDIR/qemu-system-x86_64, a program that starts it
#
# Takes it from Debian's backports, from the mirror that apt is set up with, through lists of
# its own: neither apt's sources nor installed packages change. Where the installed QEMU
# is recent enough, that one is used. Idempotent, safe to run from several processes at once,
# needs no network once it is there.
set -euo pipefail

MINIMUM=10
PACKAGES=(qemu-system-x86 qemu-system-data qemu-system-common seabios)
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

main() {
    if [ $# -ne 1 ]; then
        echo "usage: scripts/qemu10.sh OUTDIR" >&2
        exit 2
    fi
    local script
    script=$(realpath "${BASH_SOURCE[0]}")
    mkdir -p "$1"
    out=$(cd "$1" && pwd)
    exec 9>"$out/lock"
    flock 9
    # What was unpacked with this script for this directory stays.
    stamp=$( (cat "$script"; echo "$out") | sha256sum)
    if [ -x "$out/qemu-system-x86_64" ] && [ "$(cat "$out/stamp" 2>&1)" = "$stamp" ]; then
        return
    fi
    work=$(mktemp -d "$out/work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    if is_recent qemu-system-x86_64; then
        printf '#!/bin/sh\nexec %s "$@"\n' "$(command -v qemu-system-x86_64)" >"$work/start"
    else
        unpack
    fi
    chmod 755 "$work/start"
    is_recent "$work/start" || fail "what was unpacked does not start, or is older than QEMU $MINIMUM"
    can_migrate "$work/start" || fail "this QEMU cannot do multifd with zstd"
    mv "$work/start" "$out/qemu-system-x86_64"
    echo "$stamp" >"$out/stamp"
}

# Whether the program is a QEMU of at least the wanted version.
is_recent() {
    local version
    version=$("$1" --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\)\..*/\1/p')
    [ "${version:-0}" -ge $MINIMUM ]
}

# Whether it knows what the peers are measured with. Asked over QMP: there is no other list.
can_migrate() {
    local schema
    schema=$(printf '%s\n' '{"execute":"qmp_capabilities"}' '{"execute":"query-qmp-schema"}' \
        '{"execute":"quit"}' | "$1" -machine none -nodefaults -display none -qmp stdio 2>/dev/null)
    [[ $schema == *'"name": "zstd"'* && $schema == *'"name": "postcopy-preempt"'* ]]
}

unpack() {
    local codename uri options packages deb
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    # The first of apt's sources that carries this release.
    uri=$(apt-get indextargets --format '$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)' \
        'Created-By: Packages' | sed -n "s/|$codename|main|Debian\$//p" | head -n 1)
    if [ -z "$codename" ] || [ -z "$uri" ]; then
        fail "apt has no source of a Debian release; install QEMU $MINIMUM or newer"
    fi
    mkdir -p "$work"/apt/{sources,lists/partial,cache/archives/partial,empty}
    {
        echo "Types: deb"
        echo "URIs: $uri"
        echo "Suites: $codename $codename-backports"
        echo "Components: main"
        # Elsewhere the keys that apt trusts anyway have to do.
        if [ -f "$KEYRING" ]; then echo "Signed-By: $KEYRING"; fi
    } >"$work/apt/sources/debian.sources"
    # As root apt would otherwise try, and complain, to drop to a user who may not write here.
    options=(-qq -o "APT::Sandbox::User=$(id -un)"
        -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$work/apt/sources"
        -o Dir::Etc::Preferences=/dev/null -o "Dir::Etc::PreferencesParts=$work/apt/empty"
        -o "Dir::State::Lists=$work/apt/lists" -o "Dir::Cache=$work/apt/cache")
    echo "qemu10: reading the package lists of $codename-backports" >&2
    apt-get "${options[@]}" update || fail "apt cannot read $uri"
    # What installing it would bring in or bring up to date, libraries too; and always QEMU's own.
    mapfile -t packages < <({
        printf '%s\n' "${PACKAGES[@]}"
        apt-get "${options[@]}" --simulate --no-install-recommends \
            --target-release "$codename-backports" install qemu-system-x86 |
            sed -n 's/^Inst \([^ ]*\) .*/\1/p'
    } | sort -u)
    echo "qemu10: downloading ${packages[*]}" >&2
    mkdir "$work/debs" "$work/root"
    (cd "$work/debs" && apt-get "${options[@]}" --target-release "$codename-backports" \
        download "${packages[@]}") || fail "apt cannot download ${packages[*]} from $uri"
    for deb in "$work"/debs/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$work/root" --no-same-owner
    done
    rm -rf "$out/root"
    mv "$work/root" "$out/root"
    local lib=$out/root/usr/lib/x86_64-linux-gnu
    cat >"$work/start" <<EOF
#!/bin/sh
export LD_LIBRARY_PATH="$lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}" QEMU_MODULE_DIR="$lib/qemu"
exec "$out/root/usr/bin/qemu-system-x86_64" -L "$out/root/usr/share/qemu" \\
    -L "$out/root/usr/share/seabios" "\$@"
EOF
}

fail() {
    echo "qemu10: $*" >&2
    exit 1
}

main "$@"
