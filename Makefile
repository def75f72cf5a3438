# The commands of the README.  All of them set themselves up: a virtual environment in .venv, nothing outside it.
PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
# A further package index, where yours carries no CPU build of torch: make demo TORCH_INDEX=...
TORCH_INDEX ?=
# Where an NVIDIA driver is present, the package index's own torch (a CUDA build) and the triton that it asks for.
HAS_NVIDIA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PIP_TORCH := $(PIP) install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SETUP := $(VENV)/.setup
NATIVE := $(VENV)/.native
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
RUN ?= runs/demo

.PHONY: setup demo test test-extended lint format filemap pictures report clean sanitize test-vector-widths test-cuda-build

setup: $(SETUP) $(NATIVE)

$(SETUP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or later"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: on Debian, install python3-venv"; exit 1; }
ifeq ($(HAS_NVIDIA),yes)
	$(PIP_TORCH) "torch>=2.11"
else
	@# The CPU build by its own name; an index that does not carry it has only the default build, of several GB.
	$(PIP_TORCH) "torch==$(TORCH_VERSION)+cpu" || { \
	  echo "your package index has no torch $(TORCH_VERSION)+cpu (TORCH_INDEX=... names another): taking the default, large build"; \
	  $(PIP_TORCH) "torch==$(TORCH_VERSION)"; }
	@# Triton's interpreter, which the tests use, needs numpy < 2.4; registers in `inspect` differ between versions.
	$(PIP) install -q "triton==3.6.0" "numpy<2.4"
endif
	$(PIP) install -q "setuptools>=77" wheel "pybind11>=2.13" ninja
	MMKERNELS_SKIP_NATIVE=1 $(PIP) install -q --no-build-isolation -e ".[model,dev]"
	@touch $@

$(NATIVE): $(SETUP) setup.py $(CSRC)
	@$(PY) -m mmkernels.build && touch $@ || echo "going on in pure Python: slower, and explain() says so"

# QUICK=1: a procedural set instead of the stamps, about a minute.
demo: setup
ifeq ($(QUICK),1)
	$(PY) -m mmmodel demo --quick --out runs/quick
else
	$(PY) -m mmmodel demo --out $(RUN)
endif

# Three processes: Triton decides at import between compiling and interpreting.  One thread each: two workers.
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --max-worker-restart 0
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --dist loadfile --max-worker-restart 0
	OMP_NUM_THREADS=1 $(PY) -m mmkernels.inspect --arch sm_90 --check

# The same checks on thousands of cases: before a release, or after a change to a kernel.  Some take long.
test-extended: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest --extended -n 2 -o faulthandler_timeout=0
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest --extended -n 2 -o faulthandler_timeout=0

# ASan and UBSan over the tests of the planner and the CPU operators, in a copy of the checkout.
sanitize: setup
	$(PY) tests/sanitize.py

# The tests of the CPU operators on what CPUs with AVX-512 alone, with AVX2, and with neither, run: built so, in copies.
test-vector-widths: setup
	$(PY) tests/vector_widths.py

# All native modules with a CUDA torch, no GPU needed, and one _C binary on two versions of torch.  Downloads several GB
# once; CUDA_VENV=... names an environment that is there already.  Needs nvcc.
CUDA_VENV ?= .venv-cuda
test-cuda-build: setup $(CUDA_VENV)/bin/python
	$(CUDA_VENV)/bin/python tests/cuda_build.py --also $(PY)

$(CUDA_VENV)/bin/python:
	$(PYTHON) -m venv $(CUDA_VENV).new
	$(CUDA_VENV).new/bin/python -m pip install -q "torch==2.11.0" "numpy<2.4" "setuptools>=77" "pybind11>=2.13" pytest hypothesis \
	  timm "torchvision==0.26.*"
	rm -rf $(CUDA_VENV) && mv $(CUDA_VENV).new $(CUDA_VENV)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*' | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*' | xargs $(VENV)/bin/clang-format -i

# Rewrites the file map of the README from the first line of each file.
filemap: setup
	$(PY) tests/file_map.py --write

# Draws the masks of docs/attention.md and the packs of docs/planner.md again.
pictures: setup
	$(PY) -m docs.mask_pictures
	$(PY) -m docs.pack_pictures

# The report of the results in benchmarks/results, and the generated parts of README and docs/evidence.md.
report: setup
	$(PY) -m benchmarks report $(wildcard benchmarks/results/*.json benchmarks/results/gpu*/*.json) --out docs/report --docs

clean:
	rm -rf build *.egg-info mmkernels/*.so $(NATIVE)
