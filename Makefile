# Everything a newcomer needs: `make demo` and `make test`. Both create .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests and the demo run offline.
export HF_HUB_OFFLINE := 1

.PHONY: demo studio test test-slow test-triton test-attack test-gpu lint docs bench digits emoji clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[cpu,openvino,tensorrt-rtx,dev]"
	touch $@

# ONNX Runtime for Node and for the browser, where there is npm: tests of the programs in examples/ skip without them.
$(VENV)/.node: examples/browser/package.json examples/single_graph/package.json | $(VENV)/.installed
	for folder in browser single_graph; do ! command -v npm > /dev/null || \
	  npm install --ignore-scripts --no-audit --no-fund --silent --prefix examples/$$folder; done
	touch $@

# Gradio wants an older Pillow than the pinned one: it gets a .venv-studio of its own over the packages of .venv.
STUDIO := $(VENV)-studio
$(STUDIO)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(STUDIO)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(STUDIO)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth"
	$(STUDIO)/bin/pip install --quiet "gradio>=6" "pillow<13"
	touch $@

studio: $(STUDIO)/.installed  ## the page that compares two engines on the shipped model, in your browser
	$(STUDIO)/bin/python -m accel studio digits/4step-int8

# NVIDIA's Triton server, without its C++ backends; only its files are used, so what the package asks for is left out.
TRITON := $(VENV)-triton
$(TRITON)/.installed:
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/pip install --quiet --no-deps nvidia-pytriton==0.7.0
	touch $@

test-triton: $(VENV)/.installed $(TRITON)/.installed  ## a repository of ours on NVIDIA's Triton server
	$(BIN)/python -m pytest -q -m slow tests/export/triton/test_real_server.py

demo: $(VENV)/.installed  ## the whole story in about a minute: images and a table in out/demo
	$(BIN)/accel demo --out out/demo --overwrite

# A process that a library ends fails the run with the test's name: started again, pytest-xdist can wait for ever.
test: lint $(VENV)/.node  ## lint and the CPU tests, about 20 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --max-worker-restart 0 --durations 20

test-slow: $(VENV)/.installed  ## real-size networks: gigabytes of memory and tens of minutes
	$(BIN)/python -m pytest -q -m slow --timeout 3600

test-attack: $(VENV)/.installed  ## thousands of damaged and forged bundles, and every test of attacks; an hour
	$(BIN)/python -m pytest -q tests/attack -m "attack or not slow and not gpu"

test-gpu: $(VENV)/.installed  ## what only a CUDA device can show; says what it skips and why
	$(BIN)/python -m pytest -q -rs -m gpu

docs: $(VENV)/.installed  ## the documentation as a site in out/docs, without a warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: demo  ## every engine of this machine on the demo's bundle
	$(BIN)/accel bench out/demo/4step --prompt "a handwritten seven" --out out/bench.json --out out/bench.html --overwrite

digits: $(VENV)/.installed  ## train the shipped model from nothing into out/digits, in about 20 minutes
	$(BIN)/python -m accel.distill.digits.train --out out/digits

emoji: $(VENV)/.installed  ## train the colour model from nothing into out/emoji, in about two hours
	$(BIN)/python -m accel.distill.emoji.train --out out/emoji --hours 2

lint: $(VENV)/.installed  ## ruff's rules, its formatter, and the types of the public surface (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) $(STUDIO) $(TRITON) build out *.egg-info
