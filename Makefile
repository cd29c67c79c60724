# Needs only Python 3.11 and make. Every target sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev

# Whatever an environment says: the tests start hundreds of processes, each of which would compile again what it imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-long lint format reference bench gpu gpu-more soak soak-serve fuzz interop demo-assets clean

setup: $(READY)

# What running takes: this is all that the demo installs.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[serve]'
	touch $@

# What working on it takes besides: tests, linters, and what they look into.
$(DEV): $(READY)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/mmv demo

# All tests but the long ones, in minutes.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not long' --numprocesses auto --dist worksteal

# The others: real kills, several processes, the demo and the README from end to end. The tests of a file stay together,
# since they share what it trains; not those with most tests first, but in their order, in which the last ones are short.
test-long: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --numprocesses auto --dist loadfile --no-loadscope-reorder \
		--timeout=900

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/reference, from the options of the command line and the docstrings of the Python names.
reference: $(DEV)
	$(BIN)/python docs/generate_reference.py

bench: $(DEV)
	$(BIN)/python -m benchmarks.stores
	$(BIN)/python -m benchmarks.pictures
	$(BIN)/python -m benchmarks.generate --docs
	$(BIN)/python -m benchmarks.company
	$(BIN)/python -m benchmarks.evaluate --docs
	$(BIN)/python -m benchmarks.curves --docs --plot docs/images
	$(BIN)/python -m benchmarks.train --docs
	$(BIN)/python -m benchmarks.train --preset 3v --docs

# On a machine with a CUDA card: some eight minutes. Writes out/gpu/gpu.json and gpu.md.
gpu: $(DEV)
	$(BIN)/python -m benchmarks.gpu --out out/gpu
# What has no place in those eight minutes: ratios to the plain loop, answers, images. Writes more.json and more.md.
gpu-more: $(DEV)
	$(BIN)/python -m benchmarks.gpu --out out/gpu --run more

# Hundreds of kills, each followed by a resume: hours.
soak: $(DEV)
	$(BIN)/python -m tests.faults.soak

# A hundred clients of a server for five minutes: slow readers, cut connections, odd images, floods.
soak-serve: $(DEV)
	$(BIN)/python -m tests.serve.soak

# Changed files of every format, read in processes with limits: ten minutes. What did harm is kept in out/fuzz.
fuzz: $(DEV)
	$(BIN)/python -m tests.fuzz --minutes 10

# Compiles llama.cpp the first time, which takes about half an hour on two cores; needs a C++ compiler.
interop: $(VENV)/.interop $(VENV)/lmms/.ready
	$(BIN)/python -m pytest --timeout=1800 tests/interop tests/export/test_3v.py

$(VENV)/.interop: $(DEV)
	CMAKE_ARGS=-DGGML_NATIVE=OFF $(BIN)/pip install --constraint constraints.txt --editable '.[dev,interop]'
	touch $@

# lmms-eval in an environment of its own, which sees the packages of the other one and replaces those that it needs in
# other releases. A torchvision that was built for another torch is worse than none.
$(VENV)/lmms/.ready: $(DEV)
	$(BIN)/python -m venv $(VENV)/lmms
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(' + repr(sysconfig.get_path('purelib')) + ')')" \
		> "$$($(VENV)/lmms/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	$(VENV)/lmms/bin/pip install --constraint constraints.txt lmms-eval==0.7.3 'filelock<4' decord
	$(VENV)/lmms/bin/python -c "import torchvision" || $(VENV)/lmms/bin/pip uninstall --yes torchvision
	touch $@

# About an hour on two cores: makes again what the package ships for the demo of each generation.
demo-assets: $(READY)
	$(BIN)/python -m minimind_v.core.demo.forge --generation 2025 --out minimind_v/core/demo/assets
	$(BIN)/python -m minimind_v.core.demo.forge --generation 3v --out minimind_v/core/demo/assets/3v

# Only what these targets made themselves: trained weights lie in out, and VENV may name an environment of one's own.
clean:
	rm -rf .venv build *.egg-info
