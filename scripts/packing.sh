# Sourced by what packs roots for test guests out of Debian's packages. Needs `set -euo pipefail`, and no root; nothing
# is installed.

# Makes the folder $1, alone in it until the process ends (the lock is its file $2), with a folder to work in that goes
# then: sets `out` and `work`.
workshop() {
    mkdir -p "$1"
    out=$(cd "$1" && pwd)
    exec 9>"$out/$2"
    flock 9
    work=$(mktemp -d "$out/work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
}

# Whether $1 (a file) is there, and was made of what has the stamp $3: its stamp is in $2.
is_current() {
    [ -f "$1" ] && [ "$(cat "$2" 2>&1)" = "$3" ]
}

# Names of packages with all that they depend on, as far as apt knows them.
closure() {
    apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances "$@" |
        grep '^[a-z0-9]' | sort -u
}

# The package with the newest kernel that the metapackage $1 stands for.
newest_kernel() {
    apt-cache depends "$1" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1
}

# Downloads packages into the folder $1 and unpacks them into $2.
unpack() {
    local debs=$1 into=$2 name deb
    shift 2
    mkdir -p "$debs" "$into"
    for name in "$@"; do
        # Names that apt only knows as provided by others fail; what is missing in the end is seen then. As root apt
        # would otherwise try, and complain, to drop to a user who may not write here.
        (cd "$debs" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download "$name" 2>&1) || true
    done >>"$work/apt.log"
    for deb in "$debs"/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$into" --no-same-owner --keep-directory-symlink
    done
}

# Copies the programs $3… (paths, with the leading folders if KEEP_PATHS is set) of what is unpacked in $1 into the root
# $2, with the loader and the libraries that they load.
take_programs() {
    local from=$1 to=$2 loader program target found library
    shift 2
    loader=$(find "$from" -name 'ld-linux-x86-64.so.2' -type f | head -n 1)
    mkdir -p "$to/bin" "$to/lib64" "$to/lib/x86_64-linux-gnu"
    cp "$loader" "$to/lib64/ld-linux-x86-64.so.2"
    for program in "$@"; do
        target=$to/bin/$(basename "$program")
        if [ -n "${KEEP_PATHS:-}" ]; then
            target=$to/$program
            mkdir -p "$(dirname "$target")"
        fi
        # Some are links to others.
        cp -L "$from/$program" "$target" || lacking "$program is in none of the packages"
        found=$("$loader" --library-path "$(library_path "$from")" --list "$from/$program") || lacking "$program cannot be loaded"
        if grep 'not found' <<<"$found" >&2; then
            lacking "$program needs libraries that are in none of the packages"
        fi
        while read -r library; do
            cp -L "$library" "$to/lib/x86_64-linux-gnu/"
        done < <(sed -n 's/^.* => \(\/[^ ]*\) .*$/\1/p' <<<"$found")
    done
}

# Where Debian keeps libraries, Xen's own among them.
library_path() {
    echo "$1/lib/x86_64-linux-gnu:$1/usr/lib/x86_64-linux-gnu:$1/usr/lib/xen-4.17/lib/x86_64-linux-gnu"
}

lacking() {
    echo "$1; apt says:" >&2
    tail -n 5 "$work/apt.log" >&2
    exit 1
}

# Copies the modules $3… of the kernel that is unpacked in $1 into the folder $2, whose file `order` then names them; in
# the order of their dependencies. What the kernel has built in is passed over.
take_modules() {
    local from=$1 to=$2 module path
    shift 2
    mkdir -p "$to"
    for module in "$@"; do
        path=$(find "$from/lib/modules" -name "$module.ko" | head -n 1)
        if [ -n "$path" ]; then
            cp "$path" "$to/"
            echo "$module" >>"$to/order"
        elif ! grep -q "/$module.ko$" "$from"/lib/modules/*/modules.builtin; then
            echo "the kernel has no module $module" >&2
            exit 1
        fi
    done
}

# Packs the root $1 as the initramfs $2. Not compressed: a guest would unpack it on an emulated CPU.
archive() {
    (cd "$1" && find . -print0 | sort -z | cpio --quiet --null --create --format=newc --owner=+0:+0) >"$work/archive"
    mv "$work/archive" "$2"
}
