# Everything is installed into .venv: `make demo` and `make test` each work alone on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin

# Set in some containers: each of the many processes of the tests would then compile vbp anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test docs clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vbp needs Python >= 3.11: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: install
	$(BIN)/vbp demo

# A thread for each process: threads of several processes on the same cores wait for each other. OpenVINO has a process
# of its own: after it, other tests of the same process have ended in a segmentation fault.
test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --ignore=tests/deploy/test_openvino.py
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/deploy/test_openvino.py

# Material announces at each build that it ends in May 2027. Its successor, Zensical, runs no hooks yet.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'open build/site/index.html'

clean:
	rm -rf .venv output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
