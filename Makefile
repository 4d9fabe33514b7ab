# make demo    a scene of the photos in examples/, from nothing but Python 3.11 with venv
# make test    the tests
# make check   formatting, lint, types, sizes
# TORCH_INDEX=URL takes torch from another index; VENV=DIR uses another environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
CODE := src tests examples benchmarks
TORCH_FITS := $(BIN)/python -c 'import importlib.metadata as m; \
	v = m.version("torch").split("."); assert (int(v[0]), int(v[1])) >= (2, 6)' 2>/dev/null

.PHONY: demo setup test slow coverage check format mini bench ablation clean

demo: $(VENV)/.user
	$(BIN)/vggt reconstruct examples/motorcycle --out scene --overwrite
	@echo "The scene is in $(CURDIR)/scene: open scene.html in a browser, sparse/0 in COLMAP."

setup: $(VENV)/.dev

# Two processes of one thread each: most tests use no more, and many wait for a process of their own.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest --cov --cov-report=term-missing

check: $(VENV)/.dev
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/python tests/sizes.py

format: $(VENV)/.dev
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

# A torch that is there and fits stays; otherwise the version that we develop with.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(TORCH_FITS) || $(PIP) install $(INDEX) -c constraints.txt torch
	grep -v '^torch' constraints.txt > $(VENV)/constraints.txt
	touch $@

$(VENV)/.user: $(VENV)/.torch pyproject.toml
	$(PIP) install -c $(VENV)/constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.user

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_forward.py
	$(BIN)/python benchmarks/bench_parts.py

# The papers' claims in miniature, in well under an hour; stopped, it goes on.
ablation: $(VENV)/.dev
	$(BIN)/python benchmarks/ablation.py

# Makes mini again, in about five hours on two cores; stopped, it goes on. See docs/training.md.
FEATURES := --freeze all-but-encoder --rate 1e-2 --frames 3 4 --batch-frames 16
TRUNK := --freeze encoder --freeze depth-head --pixels 256 --rate 7e-4
DEPTH := --freeze all-but-depth-head --pixels 256 --rate 7e-4
mini: $(VENV)/.user
	$(BIN)/vggt train --out runs/features $(FEATURES) --near 0.6 --steps 3000
	$(BIN)/vggt train --out runs/features-wide --init runs/features/mini.safetensors $(FEATURES) \
		--near 1 --steps 2000 --seed 1
	$(BIN)/vggt train --out runs/trunk --init runs/features-wide/mini.safetensors $(TRUNK) \
		--near 0.7 --steps 10800
	$(BIN)/vggt train --out runs/mini --init runs/trunk/mini.safetensors $(DEPTH) \
		--near 1 --steps 5100

clean:
	rm -rf $(VENV) scene build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
