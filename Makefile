# The doors of the project. `make` alone explains them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
REINFORCE := $(VENV)/bin/clip-reinforce
TRAIN := $(VENV)/bin/clip-train
SHARDS ?= samples/train/{00000..00003}.tar
STORE ?= stores/samples.zarr
RECIPE ?= sample
WORKERS ?= 2
SUBMIT_WORKERS ?= auto
STUDENT ?=
OUT ?= runs/latest
ARGS ?=
JOBS ?= 2

# A process that is done with its share takes over tests of the other.
SIDE_BY_SIDE := -n $(JOBS) --dist worksteal
FAST := not slow and not chaos and not heavy

# Bare, a door works on the bundled samples. With data of your own, nothing of the samples is mixed in: where some of these
# are named (here or in the environment), `$(call require,SHARDS STORE)` stops a door unless both are.
named = $(strip $(foreach name,SHARDS STORE RECIPE OUT,$(if $(filter command environment,$(origin $(name))),$(name))))
missing = $(filter-out $(named),$(1))
require = $(if $(named),$(if $(missing),echo "make $@: name $(missing) as well; $(named) alone would be mixed with the samples" >&2; exit 2,:),:)

# A job runs in a folder of its own on some node: local paths have to be absolute.
everywhere = $(if $(findstring ://,$(1)),$(1),$(if $(findstring ::,$(1)),$(1),$(abspath $(1))))

.PHONY: help setup dev setup-gpu reinforce train verify info submit samples picture test test-fast test-slow coverage \
	triton test-kernels chaos corrupt fuzz simulate check pins format bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

setup: $(VENV)/ready ## the environment in .venv, with the versions of constraints.txt; with uv, where that is installed

PIP := $(PY) -m pip install -qq --disable-pip-version-check
INSTALL := $(if $(shell command -v uv),uv pip install -q --python $(PY),$(PIP)) -c constraints.txt

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a minute or two, once)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e '.[reinforce,train,export,fast]'
	@touch $@

# What tests, checks and experiments need besides. Who only runs does without: a third of the packages.
dev: $(VENV)/dev

$(VENV)/dev: $(VENV)/ready
	@echo "adding what tests need to $(VENV) (once)"
	@$(INSTALL) -e '.[dev]'
	@touch $@

# Its SSD kernel is Triton's and needs the source alone. The selective scan's, for dmclip_b, is compiled for one card.
MAMBA := mamba-ssm==2.3.2.post1
setup-gpu: setup ## mamba-ssm for its SSD kernel; with ARCH=90 (H100; 80 A100, 89 L40S) dmclip_b's too: nvcc, minutes
	@$(PIP) -c constraints.txt setuptools wheel ninja einops transformers
ifeq ($(ARCH),)
	@MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(PY) -m pip install --disable-pip-version-check \
		--no-build-isolation --no-deps $(MAMBA)
else
	@rm -rf $(VENV)/mamba && mkdir $(VENV)/mamba
	@MAMBA_SKIP_CUDA_BUILD=TRUE $(PY) -m pip download -qq --disable-pip-version-check --no-build-isolation --no-deps \
		--no-binary :all: -d $(VENV)/mamba $(MAMBA)
	@tar -xzf $(VENV)/mamba/*.tar.gz -C $(VENV)/mamba --strip-components=1
	@# It names nine kinds of cards itself, and so ignores TORCH_CUDA_ARCH_LIST.
	@sed -i "s/^    # HACK: The compiler flag/    cc_flag = ['-gencode', 'arch=compute_$(ARCH),code=sm_$(ARCH)']\n&/" \
		$(VENV)/mamba/setup.py
	@MAMBA_FORCE_BUILD=TRUE $(PY) -m pip install --disable-pip-version-check --no-build-isolation --no-deps $(VENV)/mamba
endif

reinforce: setup ## SHARDS='dir/{00000..00127}.tar' STORE=stores/x.zarr RECIPE=name: write the store; bare: the samples
	@$(call require,SHARDS STORE)
	@$(REINFORCE) run '$(SHARDS)' --store '$(STORE)' $(if $(named),$(if $(filter RECIPE,$(named)),--recipe '$(RECIPE)'),\
		--recipe sample) --workers '$(WORKERS)' $(ARGS)

train: setup ## SHARDS=.. STORE=.. STUDENT=name RECIPE=name OUT=folder: a student from a store; bare: the samples
	@$(call require,SHARDS STORE)
ifeq ($(named),)
	@$(PY) -m pipelines sample $(if $(STUDENT),--student '$(STUDENT)') $(ARGS)
else
	@$(TRAIN) fit --shards '$(SHARDS)' $(if $(STORE),--store '$(STORE)') --out '$(OUT)' \
		$(if $(filter RECIPE,$(named)),--recipe '$(RECIPE)') $(if $(STUDENT),--student '$(STUDENT)') $(ARGS)
endif

info: setup ## STORE=..: what a store holds; bare: the samples' store
	@$(REINFORCE) info '$(STORE)' $(ARGS)

verify: setup ## STORE=.. SHARDS=..: check a store, and make 100 of its views again; bare: the samples' store
	@$(call require,SHARDS STORE)
	@$(REINFORCE) verify '$(STORE)' --shards '$(SHARDS)' --replay 100 $(ARGS)

submit: setup ## RAY_ADDRESS=http://head:8265 SHARDS=.. STORE=.. RECIPE=name: the same as a job on a Ray cluster
	@test -n '$(RAY_ADDRESS)' || { echo 'name the cluster: make submit RAY_ADDRESS=http://HEAD:8265 SHARDS=.. STORE=.. RECIPE=..' >&2; exit 2; }
	@$(call require,SHARDS STORE RECIPE)
	@$(PY) -m pipelines.cluster.submit '$(RAY_ADDRESS)' python -m reinforce run '$(call everywhere,$(SHARDS))' --store '$(call everywhere,$(STORE))' \
		--recipe '$(RECIPE)' --workers '$(SUBMIT_WORKERS)' $(ARGS)

samples: dev ## rebuild the bundled samples: pictures, teachers, captioner (needs apt-get; about half an hour)
	@$(PY) -m pipelines.samples

picture: dev ## draw README's picture again, from the samples' store
	@$(PY) -m pipelines.experiments.picture --store stores/samples.zarr --shards 'samples/train/{00000..00003}.tar' \
		--key 1fab4 --out docs/picture.png

test: dev ## the tests, a few minutes; JOBS=0 runs them in one process
	@$(PY) -m pytest $(SIDE_BY_SIDE)

test-fast: dev ## the tests of an edit loop, in less than two minutes: no Ray, no training, no other process
	@$(PY) -m pytest $(SIDE_BY_SIDE) -m '$(FAST)'

test-slow: dev ## the tests at full architecture size: memory and minutes
	@$(PY) -m pytest -m slow

TRITON := triton==3.7.1
triton: dev
	@$(PIP) $(TRITON)

test-kernels: triton ## our Triton kernels in its interpreter, and compiled for an H100; no GPU; installs Triton (700 MB)
	@TRITON_INTERPRET=1 $(PY) -m pytest tests/test_kernels.py

coverage: dev ## the tests, and which lines they ran: a table, and pages in htmlcov/
	@$(PY) -m pytest $(SIDE_BY_SIDE) --cov --cov-report=term:skip-covered --cov-report=html

simulate: dev ## runs of several writers with faults, in memory: nothing lost, torn or changed (RUNS=10000)
	@RUNS=$(or $(RUNS),10000) FIRST=$(or $(FIRST),0) $(PY) -m pytest -n auto tests/test_simulation.py

corrupt: dev ## damage a store in 2000 ways, one after the other: all found, none read, all mended to the same bytes
	@DAMAGES=$(or $(DAMAGES),2000) $(PY) -m pytest -n auto tests/test_repair.py -k any_damage

fuzz: dev ## mutated tars, images and metadata of a store: no crash, no hang, counts balance (FUZZ_ROUNDS=100000 FUZZ_SEED=0)
	@FUZZ_ROUNDS=$(or $(FUZZ_ROUNDS),100000) FUZZ_SEED=$(or $(FUZZ_SEED),0) $(PY) -m pytest -n auto -rP tests/test_fuzz.py

chaos: dev ## kill workers, driver and nodes at random, and commands at each operation; compare every byte
	@KILLS=$(or $(KILLS),10) $(PY) -m pytest -m chaos

check: dev ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

# In an environment of its own, which is removed: 2 to 10 minutes, 2.5 GB (more where torch comes with CUDA). If pip finds
# no answer, constraints.txt stays as it is. torch and torchvision, which belong together, stay at their versions: a range
# of torch would bring another CUDA. To move them, edit their lines in constraints.txt before. The CPU build is called
# 2.13.0+cpu and is written as 2.13.0, which stands for any build. Run `make setup test` afterwards.
pins: ## renew constraints.txt: the newest versions that pyproject.toml allows
	@set -euo pipefail; new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; \
	grep -E '^(torch|torchvision)==' constraints.txt > "$$new/kept.txt"; \
	$(PYTHON) -m venv "$$new/venv"; \
	"$$new/venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$$new/kept.txt" -e '.[reinforce,train,export,fast,dev]'; \
	"$$new/venv/bin/python" -m pip freeze --exclude-editable | sed -e '/ @ /d' -e 's/+.*//' | LC_ALL=C sort -f > "$$new/constraints.txt"; \
	cp "$$new/constraints.txt" constraints.txt

format: dev ## let ruff lay out the code
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

bench: dev ## the benchmarks, one JSON line each (open_clip_loop needs other packages, see its docstring)
	@for bench in coca augment resize shard slab packing scale identity price losses kernels; do $(PY) -m benchmarks.$$bench --json; done

clean: ## remove what make reinforce made from the samples
	rm -rf stores/samples.zarr
