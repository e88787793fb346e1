# Each target works in a fresh clone: it makes .venv from constraints.txt first, and finds it ready the next time.
# Another interpreter: make test PYTHON=python3.12. Without a GPU, PyTorch's CPU packages are much smaller:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make quickstart

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: quickstart test test-long lint notebooks clean
quickstart: .venv/ready
	$(BIN)/stepdistill train quickstart

test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not long"

test-long: export HF_HUB_OFFLINE := 1
test-long: export OMP_NUM_THREADS := 1
test-long: .venv/ready
	$(BIN)/python -m pytest -q -n 2 -m long
	$(BIN)/python tests/mutations.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

.venv/ready: constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

notebooks: .venv/ready  # executed anew, and written with what they show: minutes
	$(BIN)/python notebooks/make.py

clean:
	rm -rf .venv build dist *.egg-info
