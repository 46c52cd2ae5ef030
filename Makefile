# make demo                  every stage on the bundled digits, on a laptop CPU
# make demo MODEL=sit-tiny   the same for SiT, or mar-tiny
# make test                  the tests
# make lint                  style: line length, unused names, import order, naming
PYTHON ?= python3
MODEL ?= dit-tiny
BIN := .venv/bin

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt pytest ruff==0.17.6
	touch $@

demo: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" bash reproduce/demo.sh $(MODEL)

test: .venv/ready
	$(BIN)/python -m pytest -q test_all.py

lint: .venv/ready
	$(BIN)/ruff check .

.PHONY: demo test lint
