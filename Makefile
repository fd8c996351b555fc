# The two commands of the README, and what they are made of. Everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help demo fuzz test test-all crash-test lint lock docs fuse bench bench-peers bench-lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.ready ## run everything offline against the simulator: make demo ARGS="--for 45"
	$(BIN)/k2 demo $(ARGS)

test: $(VENV)/.ready-dev ## the default tests
	$(BIN)/pytest -n 2 -m "not slow" $(ARGS)

test-all: $(VENV)/.ready-dev ## every test, the long ones too
	$(BIN)/pytest -n 2 $(ARGS)

crash-test: $(VENV)/.ready-dev ## kill -9 at every crash point, and 200 times at random (CRASH_ROUNDS=100 a test, CRASH_SEED=1)
	CRASH_ROUNDS=$${CRASH_ROUNDS:-100} $(BIN)/pytest -n 2 --dist loadfile tests/crash tests/test_crash.py $(ARGS)

lint: $(VENV)/.ready-dev ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# libfuse2 is the one thing of the tests that comes from the system. Without it the power-cut tests are skipped, and say so.
fuse: ## install libfuse2 for the power-cut tests (Debian, as root)
	ldconfig -p | grep -q libfuse.so.2 || apt-get install -y -qq libfuse2 || { apt-get update -qq && apt-get install -y -qq libfuse2; }

fuzz: $(VENV)/.ready-fuzz ## fuzz the parsers for long: make fuzz ARGS="--target parsers --seconds 600"
	$(BIN)/python tests/security/fuzz.py $(ARGS)

docs: $(VENV)/.ready-dev ## derive the pages that are derived
	$(BIN)/python docs/derive.py

bench: $(VENV)/.ready-dev ## measure: make bench ARGS="NAME..." (bench/README.md)
	$(BIN)/python bench/harness.py $(ARGS)

bench-peers: $(VENV)/.ready-dev ## install what is measured beside K2, in environments of their own
	$(BIN)/python bench/peers/install.py $(ARGS)

bench-lock: $(VENV)/.ready-dev ## resolve the peers' locks anew
	$(BIN)/python bench/peers/install.py --lock $(ARGS)

lock: $(VENV)/.uv ## resolve the dependencies anew
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --extra pandas -o locks/requirements.lock pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate -c locks/requirements.lock \
		--group test --group lint -o locks/dev.lock pyproject.toml
	printf "atheris==3.0.0\n" | $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate -o locks/fuzz.lock -
	printf "hatchling\neditables\n" | $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate -o locks/build.lock -

clean: ## remove the environment and the demo's data
	rm -rf $(VENV) k2-demo

# uv installs several times faster; where it cannot be had, pip does the same work.
$(VENV)/.uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "K2 needs Python 3.11 or newer, this is %s: make PYTHON=python3.x" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 || echo "uv cannot be had, pip is used"
	touch $@

INSTALL = if [ -x $(BIN)/uv ]; then VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet "$$@"; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check "$$@"; fi

$(VENV)/.ready: $(VENV)/.uv locks/requirements.lock locks/build.lock pyproject.toml
	set -- --require-hashes --only-binary :all: -r locks/requirements.lock -r locks/build.lock; $(INSTALL)
	set -- --no-deps --no-build-isolation -e .; $(INSTALL)
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready locks/dev.lock
	set -- --require-hashes --only-binary :all: -r locks/dev.lock; $(INSTALL)
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then $(MAKE) -s fuse >/dev/null || echo "libfuse2 cannot be had"; fi
	touch $@

# Without it the fuzzer still runs, on inputs chosen at random: it is built for some versions of Python only.
$(VENV)/.ready-fuzz: $(VENV)/.ready-dev locks/fuzz.lock
	set -- --require-hashes --only-binary :all: -r locks/fuzz.lock; $(INSTALL) || echo "atheris cannot be had, inputs are random"
	touch $@
