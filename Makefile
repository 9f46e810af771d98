# `make demo` turns the whole loop on this machine; `make test` runs the tests. Both set up what they need: this file brings
# uv where it is missing, uv brings Python 3.13, the packages and Node.

UV_VERSION := 0.11.33
# An answer counts, not a file: a shim may be there for another Python only.
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo $(CURDIR)/.uv/bin/uv)
# Compiled here and not by every `uv run`, which would take seconds and say so each time.
RUN := $(UV) run --compile-bytecode
# Two processes: what shares a stack of servers stays in one of them, in order (tests/conftest.py says what does).
PYTEST := $(RUN) pytest -n 2 --dist loadscope --no-loadscope-reorder
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint docs format audit browser uv

help: ## say what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

demo: $(UV) ## turn the whole loop here: make demo ARGS="--exit --report r.json"
	$(RUN) labelloop demo $(ARGS)

test: $(UV) browser ## run the tests that take minutes
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(UV) browser ## run the tests that take longer
	$(PYTEST) -m slow $(ARGS)

lint: $(UV) ## check style and types, and the workflows
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) mypy --python-version 3.12 -p training_jobs  # which SageMaker's image runs
	$(RUN) zizmor --offline --quiet --persona pedantic .github/workflows
	$(RUN) check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yaml

docs: $(UV) ## write docs/cli.md anew
	$(RUN) python .ci/cli_reference.py

format: $(UV) ## put the code into its form
	$(RUN) ruff check --fix
	$(RUN) ruff format

audit: $(UV) ## look up known vulnerabilities of all packages
	@PATH="$(dir $(UV)):$$PATH" $(RUN) --with pip-audit==2.10.0 python .ci/audit.py

# The browser tests drive Chromium: the system's, or playwright's own.
browser: $(UV)
	@$(RUN) python -m tests.browser.chromium

# For scripts: where uv is.
uv: $(UV)
	@echo $(UV)

# A virtual environment needs Debian's python3-venv, which a bare machine may lack.
$(CURDIR)/.uv/bin/uv:
	@echo "uv is missing: bringing version $(UV_VERSION) into .uv/" >&2
	@rm -rf .uv
	@python3 -m venv .uv >/dev/null 2>&1 \
	  || { rm -rf .uv; [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	       && apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null && python3 -m venv .uv; } \
	  || { rm -rf .uv; echo "python3 cannot make a virtual environment; install uv (or Debian's python3-venv) and try again" >&2; exit 1; }
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION) || { rm -rf .uv; exit 1; }
