# Everything a newcomer types. `make setup` prepares this computer; `make demo` shows what it is good for.
SHELL := /bin/bash
PYTHON := .venv/bin/python

.PHONY: help setup demo lint test conformance test-vsock bench bench-check clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing: packages, libvirtd, .venv, guest image, kernelspec
	@tools/setup.sh

demo: setup ## run the quickstart notebook in a machine and show what that proves
	@$(PYTHON) tools/demo.py

lint: setup ## check style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test: lint ## lint, then all tests with coverage (boots real machines)
	$(PYTHON) -m pytest tests/unit tests/integration tests/e2e tests/conformance -m "not long" --cov --cov-report=term --cov-fail-under=80

conformance: setup ## the suites that Jupyter has for kernels and clients, against real machines
	$(PYTHON) -m pytest tests/conformance

test-vsock: setup ## the vsock transport for real, nested: an outer guest runs an inner one (10 minutes under emulation)
	$(PYTHON) -m pytest tests/vsock -s

bench: setup ## measure what is promised, with its yardsticks (12 minutes); ONLY=cell_ratio,restore_s QUICK=1 BASELINE=1
	$(PYTHON) -m benchmarks $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick) $(if $(BASELINE),--save-baseline)

bench-check: setup ## the same, and fail where something got worse than the baseline beyond its spread
	$(PYTHON) -m benchmarks --check $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick)

clean: ## remove what was built in this folder (images and machines stay: `agentvm image remove`)
	rm -rf .venv out build dist *.egg-info .coverage .coverage.* htmlcov .mypy_cache .ruff_cache .pytest_cache .hypothesis .setup-lock
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
