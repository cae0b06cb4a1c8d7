# make demo   installs into .venv and trains a small network on two ranks, with communication hidden
# make test   installs into .venv and runs every test, the sanitizers' included
#
# Both need Linux, Python >= 3.9 with venv, a C compiler (gcc) and the network for pip. No GPU, no CUDA.

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test build wheel clean

demo: $(VENV)/.demo
	$(VENV)/bin/commrun -np 2 $(VENV)/bin/python examples/torch_digits.py

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest tests

# Builds the native module again, in place, after a change in native/.
build: $(VENV)/.test
	$(VENV)/bin/pip install --quiet --disable-pip-version-check setuptools cffi
	$(VENV)/bin/python setup.py --quiet build_ext --inplace

wheel: $(VENV)/bin/pip
	$(VENV)/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

SOURCES = pyproject.toml setup.py constraints.txt $(wildcard native/*.c native/*.h native/build.py)

$(VENV)/.demo: $(VENV)/bin/pip $(SOURCES)
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/bin/pip $(SOURCES)
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info commlib/_native*.so
