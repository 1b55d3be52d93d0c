#!/usr/bin/env bash
# Puts promtool, out of the Debian package "prometheus", at the path given; nothing is installed. Needs apt.
set -euo pipefail

target=$(realpath -m "${1:?usage: fetch_promtool.sh PATH}")
[ -x "$target" ] && exit 0
command -v apt-get dpkg-deb >/dev/null || { echo "fetch_promtool.sh: no apt-get here" >&2; exit 1; }

mkdir -p "$(dirname "$target")"
work=$(mktemp -d "$(dirname "$target")/promtool.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"  # apt downloads as a user of its own

cd "$work"
if ! apt-get download prometheus >log 2>&1; then
    # The lists may be missing or name a version that is gone by now.
    apt-get update >>log 2>&1 && apt-get download prometheus >>log 2>&1 || { cat log >&2; exit 1; }
fi
dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool
mv usr/bin/promtool "$target"
