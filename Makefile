# make demo   see it work: a small video model, dense and sparse, side by side
# make test   the tests
# make lint   ruff and mypy
# make bench  the CPU benchmark
# make bench-gpu    the GPU benchmarks, half an hour or more
# make quality  what sparse attention does to the videos of two trained models, on a GPU: docs/quality.md
# make coverage  docs/models.md: what is rewritten in each of diffusers' video models
# make coverage-check   whether docs/models.md is what `make coverage` would write
# make parallel-coverage  the table of models on two ranks in docs/scaling.md
# make performance  docs/performance*.md and the README's tables, from what they wrote
# make dist   wheel and source distribution, in dist/, checked
# make docs   the pages in docs/ as a site, in build/site
# make reasons  the table in docs/troubleshooting.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format bench bench-gpu quality coverage coverage-check parallel-coverage performance docs reasons dist clean
.DELETE_ON_ERROR:

# One virtual environment for each set of extras asked for, made from the project's own files.
$(VENV)/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

demo: $(VENV)/installed-demo
	$(BIN)/python examples/demo.py

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-lint $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-demo
	$(BIN)/python -m benchmarks.attention.cpu_attention

bench-gpu: $(VENV)/installed-demo
	$(BIN)/python -m benchmarks.attention.gpu_attention
	$(BIN)/python -m benchmarks.attention.gpu_attention --dtype float32 --sparsity 0.64 0.8
	$(BIN)/python -m benchmarks.attention.gpu_masks
	$(BIN)/python -m benchmarks.attention.gpu_patterns
	$(BIN)/python -m benchmarks.attention.gpu_int8
	$(BIN)/python -m benchmarks.attention.gpu_scaling
	$(BIN)/python -m benchmarks.attention.gpu_random_blocks
	$(BIN)/python -m benchmarks.models.whole_model
	$(BIN)/python -m benchmarks.models.whole_model --models wan-1.3b-small wan-1.3b wan-14b --blocks

quality: $(VENV)/installed-demo
	$(BIN)/python -m benchmarks.quality.video_quality demo
	$(BIN)/python -m benchmarks.quality.video_quality scenes --captions 8
	$(BIN)/python -m benchmarks.quality.attention_quality demo --captions 2
	$(BIN)/python -m benchmarks.quality.attention_quality scenes --captions 2
	$(BIN)/python -m benchmarks.quality.rounding demo
	$(BIN)/python -m benchmarks.quality.rounding scenes
	$(BIN)/python -m benchmarks.pages.quality_page

coverage: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.coverage.model_coverage

coverage-check: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.coverage.model_coverage --check

parallel-coverage: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.coverage.parallel_coverage

performance: $(VENV)/installed-demo
	$(BIN)/python -m benchmarks.pages.performance_page
	$(BIN)/python -m benchmarks.pages.scaling_page

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

reasons: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.pages.reasons_page

dist:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet build twine
	rm -rf build/lib build/bdist* dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) demo_output pipeline_output build dist *.egg-info
