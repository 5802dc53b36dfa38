# Environments of other libraries beside .venv, for the scripts of this folder: sourced from the root of the repository.
make_venv() { # folder, packages...
  local place=$1
  shift
  [ -x "$place/bin/python" ] && return
  python3 -m venv "$place"
  "$place/bin/pip" install --quiet "$@" || { rm -rf "$place"; echo "$place could not be made" >&2; }
}
make_venv .venv-optimum torch==2.13.0 optimum-onnx==0.1.0 optimum==2.1.0 transformers==4.57.6 diffusers==0.36.0 \
  onnx==1.23.2 onnxruntime==1.31.1 accelerate
make_venv .venv-openvino torch==2.13.0 "optimum-intel[openvino]==2.2.0" diffusers==0.39.0 nncf==3.4.0 accelerate \
  openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0
.venv-openvino/bin/pip uninstall --quiet --yes torchvision # comes along, and may not fit a CPU build of torch
