# make sample and make test do all their own set-up; they need Python 3.11 to 3.13 with pip, nothing else.
#   PYTHON=python3.13 make test     another interpreter, in a folder of its own: .venv-python3.13
#   make test CONSTRAINTS=tests/oldest.txt VENV=.venv-oldest     the oldest releases that are promised to work
#   TORCH="torch==2.13.0 --index-url ..." make parity     another build of torch (the default may be a CUDA one)
#   make aot ONLY="not 4x4x4 and not 4x4x8 and not 16x16"     some of those programs, as pytest -k takes it; so for make test
ifeq ($(origin PYTHON),undefined)
VENV ?= .venv
PYTHON := $(or $(shell test -x $(VENV)/bin/python && echo $(VENV)/bin/python),python3)
endif
VENV ?= .venv-$(notdir $(PYTHON))
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PLAIN := not live and not aot and not aot_gpu and not browser
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: fuzz sample test slow browser browser-setup server lint aot aot-setup aot-gpu aot-gpu-setup golden parity parity-setup bench demo docs docs-setup notebook \
        launch-check launch-setup clean

sample: $(VENV)/.installed  ## the packaged demo model on its own two frames: out/video.mp4
	$(BIN)/python sample_jax.py

test: $(VENV)/.installed  ## what needs neither torch nor an accelerator's compiler
	@echo "Deselected here: slow (half a minute and more each, run 'make slow'), live (against diffusers, run 'make parity'),"
	@echo "aot (compiles for TPUs, run 'make aot'), aot_gpu (compiles for NVIDIA GPUs, run 'make aot-gpu')"
	@echo "and browser (the page in Chromium, run 'make browser')."
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow and $(PLAIN)" -k "$(ONLY)"

slow: $(VENV)/.installed  ## the slowest of the tests that need no more: runs killed and resumed, two processes, whole commands
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "slow and $(PLAIN)" -k "$(ONLY)"

aot: $(VENV)/.aot  ## full-size programs compiled for TPUs on this machine: half an hour of one core, 8 GB of memory
	$(BIN)/python -m pytest -m aot -k "$(ONLY)"

aot-setup: $(VENV)/.aot

aot-gpu: .venv-gpu/.installed  ## kernels and full-size programs compiled for NVIDIA GPUs: a minute
	.venv-gpu/bin/python -m pytest -m aot_gpu tests/test_gpu_aot.py

aot-gpu-setup: .venv-gpu/.installed

browser: .venv-browser/.installed  ## the page in Chromium, which has to be there: apt-get install chromium
	.venv-browser/bin/python -m pytest -m browser tests/test_page.py

browser-setup: .venv-browser/.installed
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "Chromium is not installed" >&2; exit 1; }

server: $(VENV)/.installed  ## the server under clients and kills, and random requests against its own schema
	$(BIN)/python benchmarks/server.py
	$(BIN)/python -m pip install --quiet "schemathesis>=4,<5"
	$(BIN)/python benchmarks/requests_at_random.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

golden: $(VENV)/.golden  ## remakes tests/golden but for official/
	$(BIN)/python tests/golden/make_golden.py
	$(BIN)/python tests/golden/make_golden_solvers.py

parity: $(VENV)/.golden  ## against diffusers and transformers running beside it
	$(BIN)/python -m pytest -m live

parity-setup: $(VENV)/.golden

FORMATS := safetensors gguf npy mp4
fuzz: $(VENV)/.installed  ## inputs guided by coverage for binary formats, FOR=60 seconds each
	$(PIP) --editable ".[dev,fuzz]"
	set -e; for format in $(FORMATS); do \
	  $(BIN)/python benchmarks/fuzzing/guided.py $$format -max_total_time=$(or $(FOR),60); done

bench: $(VENV)/.installed  ## all that this machine can measure, in hours: out/bench/DATE.json and .md; BENCH=--quick in minutes
	$(BIN)/python benchmarks/all.py $(BENCH)

docs: $(VENV)/.docs  ## the pages, into out/site; whatever is wrong with them is an error
	$(BIN)/python docs/flags.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-setup: $(VENV)/.docs

notebook: $(VENV)/.docs  ## runs docs/tour.ipynb and keeps what it shows
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/jupyter execute --inplace docs/tour.ipynb

launch-check: $(VENV)/.launch  ## docs/launch as far as it can be checked without the hardware
	$(BIN)/shellcheck docs/launch/*.sh
	$(BIN)/hadolint docs/launch/Dockerfile docs/launch/Dockerfile.tpu
	$(BIN)/kubernetes-validate --strict docs/launch/gke.yaml

launch-setup: $(VENV)/.launch

DEMO := out/demo
TRAIN = $(BIN)/python train_jax.py --config configs/demo_$(1).py && test -d $@
CACHE = $(BIN)/python -m wanjax cache --config configs/demo_stage$(1).py --out $(DEMO)/clips$(1)

demo: $(DEMO)/stage3/model  ## trains the demo model anew, in hours, and puts it into wanjax/demo; again: goes on
	$(BIN)/wanjax demo --publish $<

# A model's folder appears when its training is done; a training that was interrupted goes on from its checkpoint.
$(DEMO)/vae/model: | $(VENV)/.installed
	$(call TRAIN,vae)
$(DEMO)/vae_long/model: | $(DEMO)/vae/model
	$(call TRAIN,vae_long)
$(DEMO)/towers/model: | $(DEMO)/vae_long/model
	$(call TRAIN,towers)
$(DEMO)/clips%/index.json: | $(DEMO)/towers/model
	$(call CACHE,$*)
$(DEMO)/stage1/model: | $(DEMO)/clips1/index.json
	$(call TRAIN,stage1)
$(DEMO)/stage2/model: | $(DEMO)/clips2/index.json $(DEMO)/stage1/model
	$(call TRAIN,stage2)
$(DEMO)/stage2_long/model: | $(DEMO)/clips2_long/index.json $(DEMO)/stage2/model
	$(call TRAIN,stage2_long)
$(DEMO)/stage3/model: | $(DEMO)/clips3/index.json $(DEMO)/stage2_long/model
	$(call TRAIN,stage3)

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache out

# An environment is of one Python and one set of constraints, and is not taken for another.
VERSION := -c 'import sys; print("Python %d.%d" % sys.version_info[:2])'
ASKED = $$($(PYTHON) $(VERSION))$(if $(CONSTRAINTS), with $(CONSTRAINTS))
.PHONY: $(VENV)/.made-of
$(VENV)/.made-of:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is not there or older than Python 3.11; give another: PYTHON=python3.12 make ..." >&2; exit 2; }
	@test -x $(BIN)/python || { mkdir -p $(VENV) && echo "$(ASKED)" > $@; }
	@made="$$(cat $@ 2>/dev/null || $(BIN)/python $(VERSION))"; test "$$made" = "$(ASKED)" || \
	  { echo "error: $(VENV) is of $$made, not of $(ASKED); give another folder, VENV=..., or remove it" >&2; exit 2; }

# The stamp is younger than pyproject.toml: installed, and nothing to do.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/.made-of
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing wanjax and its tools into $(VENV) (a few minutes the first time)"
	$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/.golden: $(VENV)/.installed
	@echo "Installing torch, diffusers and accelerate into $(VENV) (long the first time)"
	$(PIP) $(TORCH)
	$(PIP) --editable ".[dev,golden]"
	@touch $@

$(VENV)/.aot: $(VENV)/.installed
	@echo "Installing libtpu into $(VENV)"
	$(PIP) --editable ".[dev,aot]"
	@touch $@

# A place of its own: Gradio wants an older Pillow.
.venv-browser/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-browser
	@echo "Installing Gradio and Playwright into .venv-browser"
	.venv-browser/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,browser]"
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@echo "Installing MkDocs into $(VENV)"
	$(PIP) --editable ".[dev,docs]"
	@touch $@

$(VENV)/.launch: $(VENV)/.installed
	@echo "Installing shellcheck, hadolint and kubernetes-validate into $(VENV)"
	$(PIP) --editable ".[dev,launch]"
	@touch $@

# A place of its own: with its plugin, jax complains on every import that there is no GPU.
.venv-gpu/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	@echo "Installing jax's CUDA plugin into .venv-gpu"
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,aot-gpu]"
	@touch $@
