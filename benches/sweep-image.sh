#!/bin/bash
# Makes the layers that benches/sweep.rs publishes: sweep-image.sh DIR leaves DIR/{1-base,2-python,3-numpy}.tar.gz.
# Packages come from Debian's mirror and PyPI by their ordinary clients; needs apt-get, dpkg-deb, pip, network.
set -euo pipefail
out=$1
mkdir -p "$out"
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{cache/archives/partial,1-base,2-python,3-numpy/usr/lib/python3/dist-packages}
: > "$work/no-packages"

# With no package installed, apt downloads all that these need.
apt-get -qq -y -o Dir::State::Status="$work/no-packages" -o Dir::Cache="$work/cache" -o APT::Install-Recommends=false \
  --download-only install base-files base-passwd bash coreutils dash libc-bin python3 python3-pip gcc ca-certificates > "$work/apt.log"
for deb in "$work"/cache/archives/*.deb; do
  case ${deb##*/} in
    *python3* | *gcc* | *cpp* | *binutils* | libc6-dev* | linux-libc*) dpkg-deb -x "$deb" "$work/2-python" ;;
    *) dpkg-deb -x "$deb" "$work/1-base" ;;
  esac
done

minor=$(basename "$(echo "$work"/2-python/usr/bin/python3.[0-9]*)" | cut -d. -f2)
pip download -q --no-deps --only-binary :all: --python-version "3.$minor" --implementation cp --abi "cp3$minor" \
  --platform manylinux2014_x86_64 -d "$work" numpy scipy
for wheel in "$work"/*.whl; do
  python3 -m zipfile -e "$wheel" "$work/3-numpy/usr/lib/python3/dist-packages"
done

for layer in 1-base 2-python 3-numpy; do
  tar --sort=name --mtime=@1700000000 --owner=0 --group=0 --numeric-owner -C "$work/$layer" -cf - . | gzip -6 -n > "$out/$layer.tar.gz"
done
