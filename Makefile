# make demo    install, then train, evaluate and predict on drawn scenes (minutes on two CPU cores)
# make demo-published    the original's demonstration: published weights and picture (downloads 110 MB)
# make test    install, then the tests
# make test-gpu the tests that need a GPU, of five minutes in all
# make check   formatting, lint, who imports whom, and types
# make configs write what repeats the schema: keys in configs/, docs/configuration.md, the sections in --help
# make messages write the messages that matter to users again, in tests/golden/messages.json
# make docs    the documentation as a site, in site/; a broken link fails it
# make wheel   what is published, in dist/
# make bench   every benchmark of the CPU, other libraries in the same run where they install (a quarter of an hour)
# make audit   ask for known vulnerabilities of the versions in constraints.txt
# make lock    write constraints.txt from what is installed, extras included

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes with one thread each: the tests start many small programs that keep one core busy.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-published install test test-fast test-long test-gpu check format configs messages docs wheel bench audit lock clean

demo: install
	$(BIN)/python run.py experiment=quickstart

demo-published: install
	$(BIN)/python run.py mode=predict ckpt=zoo:resnet50_dilated8_ppm_deepsup predict.save=[panel]

install: $(VENV)/.installed

test: $(VENV)/.installed-dev
	$(PYTEST)

test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-long: $(VENV)/.installed-dev
	$(PYTEST) -m "long or not long"

test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

configs: $(VENV)/.installed-dev
	$(BIN)/python -m semseg.config.generate

messages: $(VENV)/.installed-dev
	$(BIN)/python tests/golden/make_messages.py

docs: $(VENV)/.installed-dev
	$(BIN)/zensical build --strict --clean

bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench,export]"
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/training_step.py --model resnet50_dilated8_ppm_deepsup
	$(BIN)/python benchmarks/networks.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/evaluation.py --model resnet18_dilated8_ppm_deepsup
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/evaluation.py --reading 24 --scales 300
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/winograd.py
	$(BIN)/python benchmarks/pointwise.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/channels_last.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/prediction.py
	$(BIN)/python benchmarks/inference_memory.py
	$(BIN)/python benchmarks/syncbn.py
	$(BIN)/python benchmarks/startup.py

wheel:
	$(PYTHON) -m venv $(VENV)/build
	$(VENV)/build/bin/python -m pip install --quiet build==1.6.1
	$(VENV)/build/bin/python -m build

# Nothing is installed but the tool itself, and that in an environment of its own.
audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	$(VENV)/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

# Names and versions only: no hosts, no hashes of one platform's files.
lock: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --editable ".[dev,tb]"
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==' > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
