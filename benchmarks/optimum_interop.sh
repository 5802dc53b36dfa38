#!/usr/bin/env bash
# optimum-onnx needs transformers below 4.58, which current diffusers does not accept, so it lives in an environment of
# its own. From the root of the repository, after `make demo`:
#   bash benchmarks/optimum_interop.sh out/demo/bundle
set -euo pipefail
bundle=$1
here=$(dirname "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=.venv-optimum
if [ ! -x "$venv/bin/python" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet torch==2.13.0 optimum-onnx==0.1.0 optimum==2.1.0 transformers==4.57.6 \
    diffusers==0.36.0 onnx==1.23.2 onnxruntime==1.31.1
fi
.venv/bin/python "$here/optimum_interop.py" ours "$bundle" "$work"
"$venv/bin/python" "$here/optimum_interop.py" theirs "$bundle" "$work"
