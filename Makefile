# What CI runs (.ci/run), one by one. Everything uses the Python of the active environment.
.PHONY: style quality types test test-slow mutations docs

style:  ## Format the code and repair what can be repaired
	ruff format .
	ruff check --fix .

quality:  ## Check format and code
	ruff format --check .
	ruff check .

types:  ## Check type hints
	mypy

test:  ## Everything that needs neither weights nor a GPU
	pytest

test-slow:  ## What takes minutes, needs released weights, or a GPU
	pytest -m "slow or gpu"

mutations:  ## Deliberate errors in the whole package, each of which a test must notice; takes a while
	python tests/mutations/run_mutations.py

docs:  ## The documentation as a site, in build/docs; a warning is an error
	python -m sphinx -W --keep-going -q -b html docs build/docs
