# make demo   set up, make a data set, train and evaluate a detector and a segmentor
# make test   set up if need be, run all tests
# make soak   what takes too long for a test: trainings killed again and again, thousands of steps;
#             writes benchmarks/soak.md
# make test-openmmlab   the tests on the last OpenMMLab releases, in an environment of its own;
#                       TESTS=... names some of them
# make test-openmmlab-core   only those of building, loading and computing
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
RUN := $(VENV)/bin/python

# What each environment depends on besides its own requirements.
SOURCES := requirements/build.txt requirements/torchvision.txt setup.py \
    crossformer_mm/kernels/avx512.cpp

OPENMMLAB := .venv-openmmlab
TESTS ?= tests
CORE := tests/test_backbone.py tests/test_golden.py tests/test_checkpoint.py tests/test_configs.py \
    tests/test_released_files.py tests/test_publish_model.py

# One that cannot be imported would take MMDetection with it.
define torchvision
$(1) -m pip install --no-deps -r requirements/torchvision.txt
@$(1) -W ignore -c 'import torchvision' 2> /dev/null || { $(1) -m pip uninstall --yes torchvision; \
    echo "torchvision does not fit this torch and is taken out: pretraining does not work here"; }
endef

.PHONY: demo test soak test-openmmlab test-openmmlab-core setup clean
setup: $(READY)

$(READY): $(SOURCES) requirements/run.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -r requirements/build.txt
	@echo "mmcv compiles its operators now where no wheel of it is at hand: about 9 minutes on 2 cores"
	$(RUN) -m pip install --no-build-isolation -r requirements/run.txt
	$(RUN) -m pip install --no-build-isolation --no-deps -e .
	$(call torchvision,$(RUN))
	touch $@

$(OPENMMLAB)/ready: $(SOURCES) requirements/openmmlab.txt
	$(PYTHON) -m venv $(OPENMMLAB)
	$(OPENMMLAB)/bin/python -m pip install -r requirements/build.txt
	$(OPENMMLAB)/bin/python -m pip install --no-build-isolation -r requirements/openmmlab.txt
	$(OPENMMLAB)/bin/python -m pip install --no-build-isolation --no-deps -e .
	$(call torchvision,$(OPENMMLAB)/bin/python)
	touch $@

demo: $(READY)
	$(RUN) tools/demo.py

test: $(READY)
	$(RUN) -m pytest -n auto --dist loadfile tests

soak: $(READY)
	OMP_NUM_THREADS=1 $(RUN) benchmarks/soak.py --out benchmarks/soak.md

test-openmmlab: $(OPENMMLAB)/ready
	$(OPENMMLAB)/bin/python -m pytest -n auto --dist loadfile $(TESTS)

test-openmmlab-core:
	$(MAKE) test-openmmlab TESTS="$(CORE)"

clean:
	rm -rf $(VENV) $(OPENMMLAB) build dist *.egg-info work_dirs data/shapes
