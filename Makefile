# make demo    a video from a prompt, and one from an image: makes the environment, ends with
#              the paths of the two mp4s
# make test    everything that runs without a GPU: format, lint, types, tests
# make check   the quick part of it, for every change
# make gpu     everything that waits for a GPU; needs no environment of ours (see below)

suitable = $(1) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$(call suitable,$$python) && echo $$python && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt .ci/environment.py
# One thread per test process: two processes side by side use two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test check lint gpu clean

demo: $(VENV)/.stamp-run
	$(BIN)/wantrt generate "a red circle moves right" --seed 0 --out outputs/demo.mp4 --overwrite
	$(BIN)/wantrt generate "a red circle" --frames 1 --seed 0 --out outputs/demo.png --overwrite
	$(BIN)/wantrt generate "a red circle moves down" --image outputs/demo.png --seed 0 \
	  --out outputs/demo-from-image.mp4 --overwrite
	@echo "$(CURDIR)/outputs/demo.mp4"
	@echo "$(CURDIR)/outputs/demo-from-image.mp4"

test: lint
	$(PYTEST)

check: lint
	$(PYTEST) -m "not slow and not gpu"

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.stamp-run: $(INPUTS)
	$(PYTHON) .ci/environment.py $(VENV) cpu
	@touch $@

$(VENV)/.stamp-dev: $(INPUTS)
	$(PYTHON) .ci/environment.py $(VENV) cpu dev tensorrt-rtx
	@touch $@ $(VENV)/.stamp-run

# A bare machine with a GPU: its own python3 with torch, Triton, pytest, safetensors and numpy. The
# pieces are in order of importance and take at most ten minutes each; `make gpu-1` runs one alone.
# First tests, then measurements, which write into bench-results/. From 7 on whole models
# of generated weights are measured by `wantrt bench`, whose packages that python3 must have too (pip
# install '.[bench]'); 14B takes some 50 GB of the GPU's memory. What is interrupted keeps its rows.
GPU_PIECES := 1 2 3 4 5 6 7 8 9 10 11 12
GPU_1 := tests/gpu/test_runtime_on_gpu.py
GPU_2 := tests/kernels tests/bench/test_on_kernels.py
GPU_3 := tests/gpu
BENCH_4 := kernels
BENCH_5 := block
BENCH_6 := gpu_runtime
FULL := --checkpoint random:0 --runtime torch --precision bf16 --frames 81
SUITE_7 := latency $(FULL) --variant 14B --size 832x480 --steps 3 --runs 2 --out bench-results/14b-480p
SUITE_8 := latency $(FULL) --variant 1.3B --size 832x480 --steps 5 --out bench-results/1.3b-480p
SUITE_9 := latency $(FULL) --variant 14B --size 1280x720 --steps 1 --runs 1 --out bench-results/14b-720p
BESIDE := --runtime torch --precision bf16 --frames 81 --size 832x480
SUITE_10 := compare $(BESIDE) --scope dit --variant 14B --blocks 4 --out bench-results/14b
SUITE_11 := compare $(BESIDE) --scope dit --variant 1.3B --blocks 10 --out bench-results/1.3b
SUITE_12 := compare $(BESIDE) --scope vae --out bench-results/vae

gpu:
	@failed=; for piece in $(GPU_PIECES); do \
		$(MAKE) --no-print-directory gpu-$$piece || failed="$$failed $$piece"; done; \
	test -z "$$failed" || { echo "failed pieces:$$failed"; exit 1; }

gpu-%:
	PYTHONPATH=. timeout --foreground --signal INT --kill-after 20 600 python3 -m $(or \
		$(if $(GPU_$*),pytest -m gpu $(GPU_$*)),$(addprefix wantrt.bench.,$(BENCH_$*)),wantrt.cli bench $(SUITE_$*))

clean:
	rm -rf $(VENV) build dist outputs .mypy_cache .pytest_cache .ruff_cache
