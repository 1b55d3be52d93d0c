#!/usr/bin/env bash
# Builds build/deb/petalsd_VERSION+FLAVOUR_ARCH.deb from the checkout, which stays as it is.
#   TORCH=cpu|cuda         which build of torch goes in
#   COMPRESSION='-Zxz -z6' what dpkg-deb is told; the default is quick
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS: where pip looks, as always
set -euo pipefail
cd "$(dirname "$0")/../.."
out=build/deb
tree=$out/tree
for tool in dpkg-buildpackage dh_virtualenv; do
  command -v $tool >/dev/null || {
    echo "$tool is missing: apt install build-essential debhelper dh-virtualenv python3-dev python3-venv" >&2
    exit 1
  }
done
rm -rf "$tree" && mkdir -p "$tree"
rm -f $out/petalsd_*
tar --create --exclude=__pycache__ --exclude='*.so' \
  petalsd kernels csrc packaging docs setup.py pyproject.toml constraints.txt README.md LICENSE | tar --extract -C "$tree"
cp -rL packaging/deb/debian "$tree/debian"
(cd "$tree" && dpkg-buildpackage --build=binary --no-sign)
rm -rf "$tree"
ls -l $out/*.deb
