"""Run several models through vLLM's offline engine, one after the other in one process: JSON in, JSON lines out.

    python tests/offline_llm.py '[{"model": "DIR", "quantization": "foem"}]' '{"prompts": [...], "continuations": [...]}' OUT

Each job's answer: greedy token ids of every prompt, and the log-probability of every token of `texts` given those before it.
"""
import gc
import json
import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="INFO")


def main():
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models import registry
    registry._run_in_subprocess = lambda look: look()  # at a model's class: another process would import everything again
    jobs, asked, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    for job in jobs:
        llm = LLM(**{"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16, "dtype": "bfloat16", "seed": 0, **job})
        greedy = llm.generate(asked["prompts"], SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True),
                              use_tqdm=False)
        scored = llm.generate(asked["texts"], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        answer = {"greedy": [list(o.outputs[0].token_ids) for o in greedy], "prompts": [list(o.prompt_token_ids) for o in greedy],
                  "texts": [list(o.prompt_token_ids) for o in scored],
                  "logprobs": [[lp[t].logprob for t, lp in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:])] for o in scored],
                  "quantization": llm.llm_engine.vllm_config.model_config.quantization}
        with open(out, "a") as file:
            file.write(json.dumps(answer) + "\n")
        del llm
        gc.collect()
    # vLLM 0.32 now and then aborts in its own shutdown, when everything asked for is long written.
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
