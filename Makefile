# make demo   set everything up and fine-tune a small model      make test    set up and run the tests
# make check  formatting, lint and types                         make clean   remove what make made
# make sanitize  kernels and emulator under AddressSanitizer and UndefinedBehaviorSanitizer
# make races     passes on several threads under ThreadSanitizer
# make faults    every fault of the lists, injected: rows 1 to 28 and the kinds A to T from the field
# make fuzz      random sequences of calls and random bytes, for long; make soak: thousands of steps, for leaks
# make docs      the site, into out/site, and a look for broken links; no network is needed to read it
# make canary    the newest transformers and peft in an environment of their own: which of our tests hold there
# make dist      sdist and wheel, installed into an empty environment and tried there
# make mutants   seeded bugs, each in a copy of the tree: the tests must catch every one

PYTHON ?= python3
# Processes that share the tests, file by file; each takes 2 GB and two threads.
JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
CXX_FOUND := $(or $(JITMOE_CXX),$(shell command -v g++ || command -v clang++))
CPP_SOURCES = $(wildcard templates/*.hpp templates/*/*.hpp templates/*/*.cpp tests/*.cpp)

.PHONY: demo test test-slow sanitize races faults fuzz soak mutants dist docs canary check format setup clean compiler

demo: setup compiler
	$(BIN)/python examples/finetune.py

test: setup compiler
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile
	@echo "The slow tests (full sizes, many processes) run with: make test-slow"

test-slow: setup compiler
	$(BIN)/python -m pytest -m slow

# The sanitizers' runtimes must come first in the process. Leaks are not looked for: the interpreter keeps what it
# has until its end, and the kernels allocate nothing. The cache is apart: its keys don't know of the sanitizers.
sanitize: setup compiler
	JITMOE_CXX=tests/sanitizing-c++ ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest -m "not slow" -o cache_dir=out/sanitize tests/test_matrix.py tests/test_amx.py \
	  tests/test_back_end.py \
	  -k "(ragged_65 or no_lora or tails or padding or sums_start) and not groups"

# ThreadSanitizer does not see into libgomp: the kernels get threads of tests/racing_gomp.cpp. Random addresses off: it
# knows no others.
races: setup compiler
	JITMOE_CXX=tests/racing-c++ JITMOE_CACHE_DIR=out/races PYTHONPATH=tests \
	  TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66" \
	  setarch -R env LD_PRELOAD="$$(g++ -print-file-name=libtsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(BIN)/python tests/races.py

faults: setup compiler
	$(BIN)/python tests/faults.py -q -m "not slow"

EXAMPLES := 500
fuzz: setup compiler
	$(BIN)/python -m pytest -m slow --examples $(EXAMPLES) tests/test_fuzz_calls.py tests/test_fuzz_readers.py

soak: setup compiler
	$(BIN)/python -m pytest -m slow tests/test_soak.py

# Some: python tests/mutants.py NAME ...
mutants: setup compiler
	$(BIN)/python tests/mutants.py

dist: compiler
	$(PYTHON) tests/dist.py

docs: setup compiler
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,docs,examples,hf]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python docs/links.py out/site

canary: compiler
	$(PYTHON) tests/canary.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES))

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "jitmoe needs Python 3.11 or newer, and '$(PYTHON)' was not found." \
	  "Install it (Debian/Ubuntu: apt install python3 python3-venv; Fedora: dnf install python3;" \
	  "conda: conda install python=3.11) or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "jitmoe needs Python 3.11 or newer," \
	  "and '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments." \
	  "Install them (Debian/Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,examples,hf]'
	@touch $@

compiler:
	@test -n "$(CXX_FOUND)" || { echo "jitmoe compiles its kernels and found no C++ compiler. Install one" \
	  "(Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda install gxx)" \
	  "or name one in JITMOE_CXX" >&2; exit 1; }

clean:
	rm -rf $(VENV) out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
