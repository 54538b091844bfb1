PY := .venv/bin/python

.PHONY: demo cluster-demo test check proto bench memory-model tunnel-bench setup setup-demo

demo: setup-demo            ## set up, make a tiny model, run a head and two agents, stream an answer
	$(PY) -m tests.demo
cluster-demo: setup         ## as root: four hosts in network namespaces, one model over all of them
	$(PY) -m tests.cluster_demo
test: setup                 ## set up everything and run the whole suite
	$(PY) -m pytest
check: setup                ## ruff, mypy strict, architecture test
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy && $(PY) -m pytest -q tests/test_architecture.py
bench: setup                ## ratios within one run
	$(PY) -m tests.bench && $(PY) -m tests.bench.predictions
memory-model: setup         ## predicted against logged memory over a grid of models, loads and splits
	$(PY) -m tests.memory_grid --write docs/memory-model.md
tunnel-bench: setup         ## what the way between two nodes costs, plain and through the tunnel
	$(PY) -m tests.bench.tunnel --write docs/tunnel.md
proto: setup                ## regenerate the committed stubs
	$(PY) -m tests.generate_stubs
setup:
	./tests/setup.sh full
setup-demo:
	./tests/setup.sh demo
