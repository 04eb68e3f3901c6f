# Everything happens in .venv and in this folder. A set-up that failed is simply run again.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
NATIVE := setup.py $(shell find csrc -type f)

.PHONY: demo test lint docs wheel sanitize sanitize-cuda valgrind clean

demo: $(VENV)/.installed
	$(PY) -m ercn doctor
	$(PY) -m ercn.demo

test: $(VENV)/.installed
	$(PY) -m ercn doctor --selftest
	$(PY) -m pytest benchmarks -m smoke -q
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m mypy

# The site in build/site; a broken link or an unknown name is an error.
docs: $(VENV)/.installed
	$(INSTALL) 'ercn[docs]'
	$(PY) -m mkdocs build --strict

wheel: $(VENV)/.installed
	$(PY) -m build --no-isolation --outdir dist

# The CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, which Python itself was not built with.
SANITIZED := build/sanitized
SANITIZER := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(VENV)/.installed
	rm -rf $(SANITIZED)
	ERCN_BUILD=cpu ERCN_CXXFLAGS="-O1 $(SANITIZER)" LDFLAGS="$(SANITIZER)" \
		$(PY) -m pip install --quiet --no-build-isolation --no-deps --target $(SANITIZED) .
	cd tests && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=../$(SANITIZED) \
		../$(PY) -m pytest -q -p no:cacheprovider cpu/test_affinity.py cpu/test_pool.py \
		cpu/test_refinement.py

# The same of the CUDA kernels, emulated. libstdc++ comes first for the exceptions of others that are loaded later.
sanitize-cuda: $(VENV)/.installed
	cd tests && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 ERCN_CXXFLAGS=-fsanitize=address OMP_NUM_THREADS=1 \
		../$(PY) -m pytest -q -p no:cacheprovider cuda/test_emulator.py cuda/test_emulator_hopper.py \
		cuda/test_pool_generic.py cuda/test_pool_arguments.py cuda/test_pool_hopper.py \
		cuda/test_affinity_hopper.py

# A small case of every CPU kernel under valgrind, which knows no AVX-512. What it finds in Python and torch is not ours.
valgrind: $(VENV)/.installed
	mkdir -p build
	PYTHONMALLOC=malloc ERCN_CPU_ISA=avx2 OMP_NUM_THREADS=1 \
		valgrind --log-file=build/valgrind.log $(PY) tests/cpu/valgrind_case.py
	! grep -n -e "ercn::" -e "libercn" build/valgrind.log

clean:
	rm -rf build dist *.egg-info ercn/lib ercn/_build.json $(VENV)/.installed

# What the extension is built with comes first, so that it is built against the torch that will run it.
$(VENV)/.environment: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools ninja
	$(INSTALL) --no-deps nvidia-cutlass
	touch $@

$(VENV)/.installed: $(VENV)/.environment pyproject.toml $(NATIVE)
	$(INSTALL) --no-build-isolation -e '.[train,export,bench,dev]'
	touch $@
