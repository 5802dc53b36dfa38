#!/bin/sh
# Build docker/Dockerfile.cpu where there is neither a Docker daemon nor a registry, and run the image.
#   sh docker/rehearse.sh FOLDER [WHEELS]     # as root, with buildah and debootstrap; 15 GB in FOLDER
# The base, which FROM names python:3.11-slim, is made of Debian bookworm's packages: its Python is 3.11 as well. WHEELS is
# a folder of wheels that pip prefers, such as torch for CPUs. Every RUN is done in a chroot, without namespaces.
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
wheels=${2:-$folder/none}
mkdir -p "$wheels"
cd "$(dirname "$0")/.."
b() { buildah --root "$folder/storage" --runroot "$folder/runroot" --storage-driver vfs "$@"; }
base=docker.io/library/python:3.11-slim

if [ ! -d "$folder/debian/usr/bin" ]; then
  packages=ca-certificates,python3,python3-venv,python3-dev,python3-pip
  debootstrap --variant=minbase --include=$packages bookworm "$folder/debian" http://deb.debian.org/debian
fi
ln -sf python3 "$folder/debian/usr/bin/python"
rm -f "$folder"/debian/usr/lib/python3*/EXTERNALLY-MANAGED  # images of Python have no such mark
printf '[global]\nfind-links = /mnt/wheels\ncert = /etc/ssl/certs/ca-certificates.crt\n' > "$folder/debian/etc/pip.conf"
made=$(b from scratch)
b copy -q "$made" "$folder/debian" /
b commit -q --rm "$made" "$base"

b bud --isolation chroot --pull-never -f docker/Dockerfile.cpu -t accel:cpu \
  --volume "$wheels:/mnt/wheels:ro" --volume /etc/ssl/certs:/etc/ssl/certs:ro .

image=$(b from --pull-never localhost/accel:cpu)
run() { b run --isolation chroot --user accel "$image" -- "$@"; }
run accel --version
run accel doctor --fast
run accel run digits/4step-int8 --prompt "a handwritten seven" --seed 7 --out /out/seven.png
run ls -ln /out
b rm "$image" > /dev/null
echo "built and run: docker/Dockerfile.cpu"
