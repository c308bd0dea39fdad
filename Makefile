# Two commands do everything on a fresh machine (Python ≥ 3.11, no Docker, no root):
#   make serve    pictures at http://127.0.0.1:8000
#   make test     lint, types and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
STUBS := service/pb/patchforge/v1/image_service_pb2.py

.PHONY: setup serve test lint types format clean

setup: $(READY) $(STUBS)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[worker,dev]'
	touch $@

$(STUBS): proto/patchforge/v1/image_service.proto $(READY)
	$(BIN)/python -m grpc_tools.protoc -Iservice/pb=proto --python_out=. --grpc_python_out=. --pyi_out=. $<
	touch $@

serve: setup
	$(BIN)/patchforge serve

test: lint types
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) service/pb/patchforge *.egg-info .mypy_cache .ruff_cache .pytest_cache
