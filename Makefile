# Two commands do everything on a fresh machine (Python ≥ 3.11, no Docker, no root):
#   make serve    pictures at http://127.0.0.1:8000
#   make test     lint, types and tests
# and one takes a few minutes more:
#   make test-faults   real processes, killed, paused and starved; REPEAT=20 runs all of them so often
PYTHON ?= python3
REPEAT ?= 1
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
STUBS := $(patsubst proto/%.proto,service/pb/%_pb2.py,$(shell find proto -name '*.proto'))
TOOLS := $(VENV)/tools
# Left to constraints.txt: which build of torch is right, and with it all that comes along, depends on the machine.
UNLOCKED := torch triton setuptools cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti \
  cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink \
  nvshmem-cu13 nvtx)

.PHONY: setup serve test test-faults test-clients lint types format lock audit clean

setup: $(READY) $(STUBS)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[worker,dev]'
	touch $@

$(STUBS): service/pb/%_pb2.py: proto/%.proto $(READY)
	$(BIN)/python -m grpc_tools.protoc -Iservice/pb=proto --python_out=. --grpc_python_out=. --pyi_out=. $<
	touch $@

serve: setup
	$(BIN)/patchforge serve

test: lint types
	$(BIN)/python -m pytest -m 'not slow'

test-faults: setup
	$(BIN)/python -m pytest tests/faults --count $(REPEAT) --repeat-scope session

# Triton's clients against a live server; installs them beside, for they need an older protobuf.
test-clients: setup
	$(BIN)/python -m pytest tests/e2e/test_triton_clients.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What gateway and worker need, for every platform, with the hashes the package index states; and of that what a gateway
# needs.
lock: $(TOOLS)
	echo '# Everything that serves, with hashes; see docs/operation.md. Made by: make lock' > requirements.lock
	$(TOOLS)/bin/uv pip compile pyproject.toml --extra worker --extra otel -c constraints.txt --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --no-header --upgrade $(addprefix --no-emit-package ,$(UNLOCKED)) -q >> requirements.lock
	echo '# What a gateway needs of requirements.lock. Made by: make lock' > requirements-gateway.lock
	$(TOOLS)/bin/uv pip compile pyproject.toml --extra otel -c requirements.lock --universal --python-version 3.11 \
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
	$@/bin/python -m pip install --disable-pip-version-check -q uv pip-audit

clean:
	rm -rf $(VENV) service/pb/patchforge service/pb/inference *.egg-info .mypy_cache .ruff_cache .pytest_cache
