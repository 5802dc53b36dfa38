#!/usr/bin/env bash
# Environments of other libraries, and benchmarks/peers.py in them. From the root of the repository, after `make test`:
#   bash benchmarks/peers.sh out/peers [--steps 4 --size 256 --rounds 5 --write]
# About 8 GB of disk; stable-diffusion.cpp is compiled from source, which takes twenty minutes on two cores.
set -euo pipefail
source "$(dirname "$0")/venvs.sh"
make_venv .venv-sdcpp stable-diffusion-cpp-python==0.4.7 numpy pillow
exec .venv/bin/python "$(dirname "$0")/peers.py" "$@"
