# Two commands do everything: `make quickstart` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
OUT    ?= quickstart
PIP     = $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt

quickstart: $(VENV)/.installed
	$(VENV)/bin/guided-dropout quickstart --out $(OUT)

test: $(VENV)/.installed-dev
	$(VENV)/bin/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

$(VENV)/.torch: constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) $(OUT)

.PHONY: quickstart test check clean
