# make demo   set up, make a data set, train and evaluate a detector and a segmentor
# make test   set up if need be, run all tests: on the newest PyTorch, with torchvision's operators instead
#             of mmcv's
# make test-compiled   the tests with a compiled mmcv, in an environment of its own
# make test-compiled-core   only those of the operators
# make test-others   the recipes of docs/other_libraries.md with their libraries, in an environment of
#                    its own; CROSSFORMER_TIMM=DIR names a checkout of timm, for its train.py
# make test-newest   the tests on the newest release of every package that pip finds, in an environment
#                    of its own, made by PYTHON; TESTS=... names some of them
# make soak   what takes too long for a test: trainings killed again and again, thousands of steps;
#             writes benchmarks/soak.md
# make lint   ruff and mypy on the code, in an environment of their own
# make docs   the documentation site in site/, likewise; a warning is an error
# make test-openmmlab   the tests on the last OpenMMLab releases, in an environment of its own;
#                       TESTS=... names some of them
# make test-openmmlab-core   only those of building, loading and computing
# make test-torch21   the tests on PyTorch 2.1 and the OpenMMLab releases for it, in an environment of
#                     its own, made by PYTHON (3.9, 3.10 or 3.11; default python3.10); TESTS as above
# make test-torch21-core   those of building, loading, computing, and one training
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
RUN := $(VENV)/bin/python

# What each environment depends on besides its own requirements.
SOURCES := pyproject.toml setup.py $(wildcard crossformer_mm/kernels/csrc/*)
BUILD_SOURCES := requirements/build.txt requirements/torchvision.txt $(SOURCES)

COMPILED := .venv-compiled
OTHERS := .venv-others
NEWEST := .venv-newest
OPENMMLAB := .venv-openmmlab
TORCH21 := .venv-torch21
LINT := .venv-lint
DOCS := .venv-docs
TESTS ?= tests
# Files in the order of tests/conftest.py, the longest first.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
COMPILED_CORE := tests/mmcv_ops tests/test_installed.py
CORE := tests/test_backbone.py tests/test_options.py tests/test_golden.py tests/test_checkpoint.py \
    tests/configs/test_configs.py tests/test_released_files.py tests/tools/test_publish_model.py
TORCH21_CORE := tests/test_golden.py tests/test_checkpoint.py tests/test_compat.py \
    tests/test_installed.py tests/kernels/test_paths.py tests/kernels/test_bias.py tests/test_grouping.py \
    tests/engine/test_killed.py tests/tools/test_publish_model.py tests/mmcv_ops

# Debugging information makes mmcv's extension forty times larger and slower to compile; its operators
# are compiled for the GPU by another compiler, so that -O1 costs little.
MMCV_FLAGS := CFLAGS="-g0 -O1 $(CFLAGS)"

# MMEngine 0.10.7 looks for the files of a package beside its metadata, which an editable install has
# elsewhere than the code: metadata in the checkout, which tests put first on the path.
metadata_here = $(1) setup.py --quiet egg_info

define compiled
$(1) -m pip install --no-compile -r requirements/torch.txt ninja psutil
@echo "mmcv compiles its operators now where no wheel of it is at hand: some minutes on 2 cores"
$(MMCV_FLAGS) $(1) -m pip install --no-compile --no-build-isolation -r requirements/run.txt -c requirements/torch.txt
$(1) -m pip install --no-build-isolation --no-deps -e .
endef

# One that cannot be imported would take MMDetection with it.
define torchvision
$(1) -m pip install --no-deps -r requirements/torchvision.txt
@$(1) -W ignore -c 'import torchvision' 2> /dev/null || { $(1) -m pip uninstall --yes torchvision; \
    echo "torchvision does not fit this torch and is taken out: pretraining does not work here"; }
endef

.PHONY: demo test lint docs soak test-compiled test-compiled-core test-others test-newest test-openmmlab \
    test-openmmlab-core test-torch21 test-torch21-core setup clean
setup: $(READY)

# Bytecode is written when a module is first imported: most of PyTorch's is never needed.
# mmcv is built in isolation, without PyTorch, and so has no operators. A wheel of mmcv that pip has
# cached may have some that were compiled for another PyTorch.
$(READY): $(SOURCES) requirements/torch.txt requirements/run.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --no-compile -r requirements/torch.txt
	$(RUN) -m pip install --no-compile --no-cache-dir --no-binary onedl-mmcv -r requirements/run.txt -c requirements/torch.txt
	$(RUN) -m pip install --no-build-isolation --no-deps -e .
	$(RUN) -m crossformer_mm.mmcv_ops
	touch $@

# With a torchvision that has operators, which are compared with the compiled ones.
$(COMPILED)/ready: requirements/torch.txt requirements/run.txt $(SOURCES)
	$(PYTHON) -m venv $(COMPILED)
	$(call compiled,$(COMPILED)/bin/python)
	touch $@

# MMRotate needs a compiled mmcv. MMPretrain cannot be imported next to Transformers 5, and MMRotate
# imports it where it is installed.
$(OTHERS)/ready: requirements/torch.txt requirements/run.txt requirements/others.txt requirements/mmpose.txt $(SOURCES)
	$(PYTHON) -m venv $(OTHERS)
	$(call compiled,$(OTHERS)/bin/python)
	$(OTHERS)/bin/python -m pip install --no-compile -r requirements/others.txt -c requirements/torch.txt -c requirements/run.txt
	$(OTHERS)/bin/python -m pip install --no-compile --no-deps --no-build-isolation --no-binary xtcocotools -r requirements/mmpose.txt
	$(OTHERS)/bin/python -m pip uninstall --yes onedl-mmpretrain
	touch $@

# The packages of `make test` without their versions. imaug, which onedl-mmdetection requires, excludes
# OpenCV 5, and OpenCV 4.12 excludes NumPy 2.3 and newer; nothing here uses imaug. Both packages of
# OpenCV install `cv2`. Remove the environment to get newer releases.
$(NEWEST)/ready: requirements/torch.txt requirements/run.txt $(SOURCES)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --no-compile --upgrade pip
	sed 's/==[^;]*//' requirements/torch.txt requirements/run.txt > $(NEWEST)/newest.txt
	$(NEWEST)/bin/python -m pip install --no-compile --no-cache-dir --no-binary onedl-mmcv -r $(NEWEST)/newest.txt openvino
	$(NEWEST)/bin/python -m pip install --no-compile --no-deps --upgrade numpy opencv-python opencv-python-headless
	$(NEWEST)/bin/python -m pip install --no-build-isolation --no-deps -e .
	$(NEWEST)/bin/python -m crossformer_mm.mmcv_ops
	touch $@

$(OPENMMLAB)/ready: $(BUILD_SOURCES) requirements/openmmlab.txt
	$(PYTHON) -m venv $(OPENMMLAB)
	$(OPENMMLAB)/bin/python -m pip install -r requirements/build.txt
	$(MMCV_FLAGS) $(OPENMMLAB)/bin/python -m pip install --no-build-isolation -r requirements/openmmlab.txt
	$(OPENMMLAB)/bin/python -m pip install --no-build-isolation --no-deps -e .
	$(call metadata_here,$(OPENMMLAB)/bin/python)
	$(call torchvision,$(OPENMMLAB)/bin/python)
	touch $@

$(TORCH21)/ready: PYTHON = python3.10
$(TORCH21)/ready: requirements/torch21-build.txt requirements/torch21.txt $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 11) and "error: PyTorch 2.1 has wheels for Python 3.8 to 3.11, this is " + sys.version.split()[0] + ": name another by PYTHON=")'
	$(PYTHON) -m venv $(TORCH21)
	$(TORCH21)/bin/python -m pip install -r requirements/torch21-build.txt
	$(TORCH21)/bin/python -m pip install --no-build-isolation -r requirements/torch21.txt -c requirements/torch21-build.txt
	$(TORCH21)/bin/python -m pip install --no-build-isolation --no-deps -e .
	$(TORCH21)/bin/python -m crossformer_mm.mmcv_ops
	$(call metadata_here,$(TORCH21)/bin/python)
	touch $@

demo: $(READY)
	$(RUN) tools/demo.py

test: $(READY)
	$(RUN) -m pytest $(PARALLEL) tests

$(LINT)/ready: requirements/lint.txt
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/python -m pip install -r requirements/lint.txt
	touch $@

lint: $(LINT)/ready
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/mypy

$(DOCS)/ready: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -r requirements/docs.txt
	touch $@

docs: $(DOCS)/ready
	$(DOCS)/bin/python docs/site/build.py

soak: $(READY)
	OMP_NUM_THREADS=1 $(RUN) benchmarks/soak.py --out benchmarks/soak.md

test-compiled: $(COMPILED)/ready
	PYTHONPATH=$(CURDIR) $(COMPILED)/bin/python -m pytest $(PARALLEL) $(TESTS)

test-compiled-core:
	$(MAKE) test-compiled TESTS="$(COMPILED_CORE)"

test-others: $(OTHERS)/ready
	PYTHONPATH=$(CURDIR) $(OTHERS)/bin/python -m pytest tests/test_other_libraries.py

test-newest: $(NEWEST)/ready
	PYTHONPATH=$(CURDIR) $(NEWEST)/bin/python -m pytest $(PARALLEL) $(TESTS)

test-openmmlab: $(OPENMMLAB)/ready
	PYTHONPATH=$(CURDIR) $(OPENMMLAB)/bin/python -m pytest $(PARALLEL) $(TESTS)

test-openmmlab-core:
	$(MAKE) test-openmmlab TESTS="$(CORE)"

test-torch21: $(TORCH21)/ready
	PYTHONPATH=$(CURDIR) $(TORCH21)/bin/python -m pytest $(PARALLEL) $(TESTS)

test-torch21-core:
	$(MAKE) test-torch21 TESTS="$(TORCH21_CORE)"

clean:
	rm -rf $(VENV) $(COMPILED) $(OTHERS) $(NEWEST) $(OPENMMLAB) $(TORCH21) $(LINT) $(DOCS) build dist site *.egg-info work_dirs data/shapes
