# make demo   set up, make a data set, train and evaluate a detector and a segmentor
# make test   set up if need be, run all tests
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
RUN := $(VENV)/bin/python

.PHONY: demo test setup clean
setup: $(READY)

$(READY): requirements/build.txt requirements/run.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -r requirements/build.txt
	@echo "mmcv compiles its operators now where no wheel of it is at hand: about 9 minutes on 2 cores"
	$(RUN) -m pip install --no-build-isolation -r requirements/run.txt
	$(RUN) -m pip install --no-build-isolation --no-deps -e .
	touch $@

demo: $(READY)
	$(RUN) tools/demo.py

test: $(READY)
	$(RUN) -m pytest tests

clean:
	rm -rf $(VENV) build dist *.egg-info work_dirs data/shapes
