#!/usr/bin/env bash
# Few-step bundles in diffusers, optimum and OpenVINO GenAI: benchmarks/few_step_elsewhere.py in three environments.
# From the root of the repository, after `make test` or `make demo`:
#   bash benchmarks/few_step_elsewhere.sh
set -euo pipefail
here=$(dirname "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
optimum=.venv-optimum genai=.venv-genai
if [ ! -x "$optimum/bin/python" ]; then
  python3 -m venv "$optimum"
  "$optimum/bin/pip" install --quiet torch==2.13.0 optimum-onnx==0.1.0 optimum==2.1.0 transformers==4.57.6 \
    diffusers==0.36.0 onnx==1.23.2 onnxruntime==1.31.1
fi
if [ ! -x "$genai/bin/python" ]; then
  python3 -m venv "$genai"
  "$genai/bin/pip" install --quiet openvino-genai==2026.4.1.0 "openvino-tokenizers[transformers]==2026.4.1.0" \
    transformers==5.24.0
fi
script=$here/few_step_elsewhere.py
.venv/bin/python "$script" make "$work"
.venv/bin/python "$script" ours "$work"
.venv/bin/python "$script" diffusers "$work"
"$optimum/bin/python" "$script" optimum "$work"
"$genai/bin/python" "$script" genai "$work"
