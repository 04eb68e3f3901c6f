# Everything happens in .venv and in this folder. A set-up that failed is simply run again.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
NATIVE := setup.py $(shell find csrc -type f)

.PHONY: demo test lint wheel clean

demo: $(VENV)/.installed
	$(PY) -m ercn doctor
	$(PY) -m ercn.demo

test: $(VENV)/.installed
	$(PY) -m ercn doctor --selftest
	$(PY) -m pytest benchmarks -m smoke -q
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(PY) -m ruff check .

wheel: $(VENV)/.installed
	$(PY) -m build --no-isolation --outdir dist

clean:
	rm -rf build dist *.egg-info ercn/_C.* ercn/_build.json $(VENV)/.installed

# What the extension is built with comes first, so that it is built against the torch that will run it.
$(VENV)/.environment: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools pybind11 ninja
	touch $@

$(VENV)/.installed: $(VENV)/.environment pyproject.toml $(NATIVE)
	$(INSTALL) --no-build-isolation -e '.[train,bench,dev]'
	touch $@
