# make demo   set up once, then rewrite a network and compare it with stock ONNX Runtime
# make test   set up once, then lint and test everything that needs no GPU
# PYTHON=python3.12 chooses another interpreter for the environment in .venv.

PYTHON ?= python3
RUNTIME := $(if $(wildcard /dev/nvidiactl),gpu,cpu)
BIN := .venv/bin
LIBRARY := ort_fcm/libort_fcm.so
CPP := $(wildcard ort_fcm/custom_ops/*.cpp ort_fcm/custom_ops/*.h)
KERNELS := $(wildcard ort_fcm/kernels/*.cuh ort_fcm/kernels/*.h)

.PHONY: all demo test lint clean
all: $(LIBRARY)

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ort_fcm needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[$(RUNTIME),test]'
	touch $@

# Installing has built it already; this is for sources changed since.
$(LIBRARY): CMakeLists.txt $(wildcard cmake/*) $(CPP) $(KERNELS) | .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cmake -S . -B build/tree -G Ninja
	$(BIN)/cmake --build build/tree
	touch $@

demo: $(LIBRARY)
	$(BIN)/python examples/compare_with_stock.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy ort_fcm planner examples
	$(BIN)/clang-format --dry-run --Werror $(CPP) $(KERNELS) $(wildcard tests/*/*.h)

test: lint $(LIBRARY)
	$(BIN)/python -m pytest -q -n 2 -m 'not gpu' tests

clean:
	rm -rf build dist $(LIBRARY)
