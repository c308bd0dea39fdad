# Two commands do everything on a fresh machine (Python ≥ 3.11, no Docker, no root):
#   make serve    pictures at http://127.0.0.1:8000
#   make test     lint, types and tests
# and these take longer:
#   make test-faults   real processes, killed, paused and starved; REPEAT=20 runs everything 20 times
#   make test-samples  50,000 samples of a tiny model, killed ten times
#   make soak          `patchforge soak` twice, shorter and with more faults: once with Sentinels and a change of versions
#   make images        gateway and worker as images, with Docker or without; make test-images draws with them
#   make test-busy     make test beside six busy loops on two cores: no test may depend on how fast the machine is
# Tests run in one process per core, at most four, and each file in one of them; JOBS=0 uses a single process.
PYTHON ?= python3
REPEAT ?= 1
ROWS ?= slow or not slow
JOBS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 2 ? 0 : cores < 4 ? cores : 4)))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
TOOLS := $(VENV)/tools
# Not in the lock files but in constraints.txt: the right build of torch, and its dependencies, depend on the machine.
UNLOCKED := torch triton setuptools cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti \
  cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink \
  nvshmem-cu13 nvtx)

.PHONY: setup serve test test-again test-busy test-faults test-samples soak test-clients images test-images lint types format diagrams screenshots package lock audit clean

setup: $(READY)

# The installation also generates the gRPC stubs, so it is due anew when the .proto files change.
$(READY): pyproject.toml setup.py constraints.txt $(shell find proto -name '*.proto')
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

serve: setup
	$(BIN)/patchforge serve

test: lint types
	$(PYTEST) -m 'not slow'

# What failed in the last run, once more, in one process and with nothing beside it: what fails again is broken.
test-again: setup
	$(BIN)/python -m pytest --last-failed --last-failed-no-failures none

test-busy: setup
	$(BIN)/python tests/busy.py $(MAKE) test

test-faults: setup
	$(PYTEST) tests/faults -m '$(ROWS)' --count $(REPEAT) --repeat-scope session

test-samples: setup
	$(BIN)/python -m tests.faults.many_samples

# Not in continuous integration: how long it takes depends on how often restarted processes must load their models.
soak: setup
	$(BIN)/python -m pytest tests/service/soak/test_soak.py

# Real clients from their registries, in environments of their own, against a live server; nginx and Prometheus too, where
# they are installed. Writes the table of clients in docs/compatibility.md.
test-clients: setup
	$(BIN)/python -m pytest tests/clients/test_clients.py
	$(BIN)/python -m pytest tests/clients/test_page.py

# IMAGES=gateway builds one; BASE= and TORCH_INDEX= are the Dockerfile's. Without Docker: Linux, root, and Debian's buildah
# and debootstrap. The tests also need runc; they build what is not up to date.
images:
	$(PYTHON) -m tests.deploy.images $(IMAGES) $(if $(BASE),--base $(BASE)) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

test-images: setup
	$(BIN)/python -m pytest tests/deploy/test_images.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The drawings of docs/architecture.md; needs Graphviz.
diagrams: setup
	$(BIN)/python -m tests.test_diagrams

# The playground on a desktop and a phone, in light and dark, in every state: screenshots/, to be looked at, and those
# that docs/images shows. Needs Chromium.
screenshots: setup
	$(BIN)/python -m tests.e2e.screenshots

# The sdist, and the wheel that it builds, in dist/: both checked, and every extra tried in a fresh environment.
package: setup $(TOOLS)
	rm -rf dist
	$(TOOLS)/bin/python -m build
	$(TOOLS)/bin/python -m twine check --strict dist/*
	$(BIN)/python -m tests.deploy.package dist

# What gateway and worker need, for every platform, with the hashes the package index states; and of that what a gateway
# needs.
lock: $(TOOLS)
	echo '# Everything that serves, with hashes; see docs/operation.md. Made by: make lock' > requirements.lock
	$(TOOLS)/bin/uv pip compile pyproject.toml --extra all --extra otel --extra s3 -c constraints.txt --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --no-header --upgrade $(addprefix --no-emit-package ,$(UNLOCKED)) -q >> requirements.lock
	echo '# What a gateway needs of requirements.lock. Made by: make lock' > requirements-gateway.lock
	$(TOOLS)/bin/uv pip compile pyproject.toml --extra server --extra otel --extra s3 -c requirements.lock --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --no-header -q >> requirements-gateway.lock

# Known vulnerabilities; asks the public advisory service. Names and versions only: pip-audit would pass over what
# requirements.lock has for other platforms, and refuse constraints.txt beside it for want of hashes.
audit: $(TOOLS)
	sed -nE 's/^([A-Za-z0-9._-]+==[^ ;]+).*/\1/p' constraints.txt requirements.lock | \
	  $(TOOLS)/bin/pip-audit --requirement /dev/stdin --no-deps --disable-pip --strict --progress-spinner off || { \
	  echo 'make audit: if vulnerabilities are listed above, they are real. "Not found on PyPI", or a failed connection:' \
	  'the advisory service could not be asked, and nothing was checked.' >&2; exit 1; }

$(TOOLS):
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --disable-pip-version-check -q build pip-audit twine uv

clean:
	rm -rf $(VENV) service/pb/patchforge service/pb/inference build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
