# make demo   installs into .venv and trains a small network on two ranks, with communication hidden
# make test   installs into .venv and runs every test, the sanitizers' included
# make bench  measures all-reduce beside gloo, MPI libraries and oneCCL, each in an environment of its own: about 6 minutes,
#             and some more the first time; what cannot be installed is reported as absent. Let the machine rest meanwhile.
# make instructions         counts the instructions of the engine's hot paths with callgrind, and compares them with what was
#             recorded: that shows on a busy machine, too, what a change costs
# make instructions-record  records them anew
# make soak   random runs of the engine with random faults (tests/native/seeds_test.c) until it is stopped or a seed fails; then it
#             prints the seed, the end of what happened, and the command that repeats it. make soak SEED=N begins with seed N
# make fuzz   needs clang with libFuzzer: looks for bytes of a peer that break the engine, over tcp and in shared memory, and what
#             parses them in Python, until it is stopped or finds something, which it leaves in build/fuzz; make fuzz SECONDS=300: as long
#             for each
# make test-tensorflow-versions  tries one wheel with TensorFlow 2.16, 2.18, 2.20 and 2.21, each in an environment of its own
# make test-older-torch  runs the PyTorch adapter's tests with the oldest torch that it supports (TORCH=2.4.1 unless you name another), in
#             an environment of its own; the wheel is a CUDA build of gigabytes, which works without a GPU
# make plots  draws docs/allreduce.svg and the README's tables from what make bench has measured
#
# The first two need Linux, Python >= 3.9 with venv, a C compiler (gcc; g++ for TensorFlow's op library) and the network for pip. No GPU, no CUDA.

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-older-torch test-tensorflow-versions bench soak fuzz plots instructions instructions-record build wheel clean

demo: $(VENV)/.demo
	$(VENV)/bin/commrun -np 2 $(VENV)/bin/python examples/torch_digits.py

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest tests

TORCH ?= 2.4.1

test-older-torch:
	$(PYTHON) -m venv .venv-torch-$(TORCH)
	.venv-torch-$(TORCH)/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH) pytest pytest-timeout hypothesis \
	    scikit-learn rich lion-pytorch setuptools -e .
	.venv-torch-$(TORCH)/bin/python -m pytest tests/frameworks/torch --ignore tests/frameworks/torch/test_typing.py

test-tensorflow-versions:
	$(PYTHON) tests/tensorflow_versions.py

bench: $(VENV)/.test
	$(VENV)/bin/python benchmarks/environments.py
	$(VENV)/bin/python benchmarks/allreduce.py --ranks 2 4 8 --output benchmarks/results/allreduce.json
	$(VENV)/bin/python benchmarks/latency.py --output benchmarks/results/latency.json

instructions:
	$(PYTHON) benchmarks/instructions.py

instructions-record:
	$(PYTHON) benchmarks/instructions.py --record

SOAK = $(wildcard native/*.c) $(addprefix tests/native/,seeds_test.c storm.c storm_end.c tasks.c world.c)
SEED ?= $(shell date +%s)0000

soak:
	mkdir -p build/soak
	$(CC) -std=gnu11 -O2 -g -pthread -o build/soak/seeds_test $(SOAK) -lm
	build/soak/seeds_test $(SEED) 0

FUZZERS = fuzz_tcp fuzz_shm
FUZZ = $(wildcard native/*.c) $(addprefix tests/native/,fuzz.c tasks.c world.c)
FUZZ_FLAGS = -std=gnu11 -O1 -g -pthread -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined
PYTHON_FUZZERS = wire hello values proof link settings told timeline
SECONDS ?= 0
TURN = $$(( $(SECONDS) > 0 ? $(SECONDS) : 60 ))

fuzz: $(VENV)/.test
	$(PIP) atheris
	for target in $(FUZZERS); do mkdir -p build/fuzz/found_by_$$target && \
	    clang $(FUZZ_FLAGS) -o build/fuzz/$$target tests/native/$$target.c $(FUZZ) -lm || exit 1; done
	while :; do for target in $(FUZZERS); do \
	    build/fuzz/$$target -max_total_time=$(TURN) -len_control=0 -max_len=1000 -rss_limit_mb=4096 \
	        -artifact_prefix=build/fuzz/$$target- build/fuzz/found_by_$$target tests/native/inputs/$$target || exit 1; \
	    done; for target in $(PYTHON_FUZZERS); do \
	        $(VENV)/bin/python tests/fuzz_python.py $$target -max_total_time=$(TURN) -artifact_prefix=build/fuzz/$$target- || exit 1; \
	    done; [ $(SECONDS) -eq 0 ] || break; done

plots: $(VENV)/.test
	$(PIP) matplotlib
	$(VENV)/bin/python benchmarks/plot.py

# Builds the native module again, in place, after a change in native/.
build: $(VENV)/.test
	$(VENV)/bin/pip install --quiet --disable-pip-version-check setuptools cffi
	$(VENV)/bin/python setup.py --quiet build_ext --inplace

wheel: $(VENV)/bin/pip
	$(VENV)/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

SOURCES = pyproject.toml setup.py constraints.txt $(wildcard native/*.c native/*.cc native/*.h native/build.py)

$(VENV)/.demo: $(VENV)/bin/pip $(SOURCES)
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/bin/pip $(SOURCES)
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info commlib/_native*.so frameworks/tensorflow/_ops*.so
