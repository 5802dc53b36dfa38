#!/usr/bin/env bash
# Environments of other libraries, and benchmarks/runtimes.py, which draws one image in each of them. From the root of the
# repository, after `make test` or `make demo`:
#   bash benchmarks/runtimes.sh out/runtimes [--write]
set -euo pipefail
source "$(dirname "$0")/venvs.sh"
exec .venv/bin/python "$(dirname "$0")/runtimes.py" "$@"
