# Everything a newcomer needs: `make demo` and `make test`. Both set the environment up first.
PYTHON ?= python3
STACK  ?= auto
RUN    := .venv/bin/python
ARGS   ?=

# Packages are installed uncompiled; where nothing compiled may be kept, vLLM takes three times as long to start, every time.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help setup demo test lint gpu-check bench bench-cpu compile-table families moe ablation mixed-precision parallel sanitize train-tinylm peers-compare peers-matrix peers-time peers-quality versions faults

help:            ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

setup:           ## make .venv: vLLM for this machine, this project, lm-eval, test tools (idempotent)
	@$(PYTHON) tools/setup_env.py --stack $(STACK)

demo: setup      ## quantize a small trained model, serve it with vLLM, ask it, measure it
	@$(RUN) eval/demo.py $(ARGS)

test: setup      ## run the tests (ARGS="tests/test_eval.py -k name" for some of them)
	$(RUN) -m pytest $(ARGS)

lint: setup      ## ruff
	$(RUN) -m ruff check .

gpu-check:       ## check kernels, quantizer and serving on an NVIDIA GPU; nothing need be installed (ARGS="--steps serve --vllm-site DIR")
	PYTHONPATH=.:kernels:eval $(PYTHON) kernels/gpu_check.py $(ARGS)

bench:           ## time the kernels beside dense products and public INT4 kernels (ARGS="--peers DIR", or "--device cpu")
	PYTHONPATH=.:kernels:eval $(PYTHON) kernels/bench.py $(ARGS)

bench-cpu: setup ## everything timed on a CPU: kernels, solver, loading, vllm serve (half an hour idle; ARGS="--llama-cpp DIR" for the first)
	$(RUN) kernels/bench.py --device cpu --budget 1200 $(ARGS)
	$(RUN) kernels/bench_solver.py
	$(RUN) kernels/bench_load.py
	$(RUN) kernels/cpu_serve.py --lm-head --bind 0-$$(($$(nproc) - 1))

compile-table: setup ## compile every GPU kernel for sm_80 to sm_100 and note registers, spills, wgmma (no GPU needed; minutes)
	$(RUN) kernels/compile_table.py $(ARGS)

sanitize:        ## the CPU kernels' C code under AddressSanitizer and UBSan, and valgrind where it is installed
	mkdir -p out
	for f in native moments grid descent; do gcc -O1 -g -std=gnu11 -fopenmp -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all \
	  -Ikernels/foem_kernels tests/$${f}_fuzz.c -lm -o out/$${f}_fuzz && out/$${f}_fuzz 2000 || exit 1; done
	! command -v valgrind || { gcc -O1 -g -std=gnu11 -Wno-psabi -Ikernels/foem_kernels tests/native_fuzz.c -lm -o out/native_fuzz && \
	  valgrind --error-exitcode=1 -q out/native_fuzz 50; }

train-tinylm: setup  ## train the demo's model again (an hour on two cores; overwrites eval/tinylm/qwen3)
	cd eval/tinylm && ../../$(RUN) corpus.py && ../../$(RUN) train.py --out qwen3

peers-compare: setup ## our solver and GPTQModel's on the same moments (installs GPTQModel into out/, once)
	$(RUN) -m foem_eval.peers.compare_solver --peers-folder out/peers --json eval/results/gptqmodel_solver.json $(ARGS)

peers-matrix: setup  ## serve GPTQModel's and AutoRound's checkpoints of every form, here and in stock vLLM (continues where it stopped)
	$(RUN) -m foem_eval.peers.serving_matrix --peers-folder out/peers $(ARGS)

families: setup      ## small models of every family: quantize, serve, compare with transformers (a few minutes)
	$(RUN) eval/families.py $(ARGS)

moe: setup           ## Mixtral and Qwen3-MoE in small: quantize, serve, ask, lm-eval, beside transformers (five minutes)
	$(RUN) eval/moe.py $(ARGS)

ablation: setup      ## what every switch of the quantizer is worth, two small models, three seeds (an hour; continues)
	$(RUN) eval/ablation.py $(ARGS)

mixed-precision: setup ## bits chosen within a budget beside one width everywhere, two small models (an hour of a core; continues)
	$(RUN) eval/mixed_precision.py $(ARGS)

versions: setup      ## the tests of serving against vLLM 0.31 and 0.32, each in an environment of its own (5 GB in out/)
	$(RUN) tools/versions.py $(ARGS)

parallel: setup      ## every form of linear with one process and two, float32 and bfloat16, and pipeline stages (half an hour)
	$(RUN) eval/parallel.py $(ARGS)

faults: setup        ## do everything that can go wrong to `foem quantize`, see how it ends (ten minutes; root, for small disks)
	$(RUN) eval/faults.py $(ARGS)

peers-time: setup    ## time and memory of `foem quantize`, GPTQModel, llm-compressor; our stages (half an hour idle; continues)
	$(RUN) -m foem_eval.peers.quantize_time --peers-folder out/peers $(ARGS)
	$(RUN) eval/quantize_stages.py

peers-quality: setup ## KL beside GPTQModel and AutoRound on both small models, three seeds (two hours; continues where it stopped)
	for m in qwen3 llama; do $(RUN) -m foem_vllm.cli compare eval/tinylm/$$m --out out/compare-$$m --peers-folder out/peers \
	  --evaluation eval/tinylm/data/evaluation.jsonl --split test --sequences 64 --calibration eval/tinylm/data/calibration.jsonl \
	  --samples 128 --seq-len 256 --bits 3,4 --seeds 0,1,2 --baseline balanced $(ARGS) \
	  --methods rtn,gptq,gptq:beta=auto,fast,balanced,best,gptqmodel:gptq,gptqmodel:gptaq,gptqmodel:foem,gptqmodel:foem+gptaq,autoround; \
	done
