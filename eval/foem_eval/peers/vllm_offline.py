"""Load checkpoints into vLLM, one after the other in one process, and note log-probabilities or why vLLM refused.

    python vllm_offline.py FOLDER OUT OPTIONS NAME...

FOLDER/NAME are checkpoints, FOLDER/tokens.safetensors holds `texts` int64 [sequences, length], OPTIONS (JSON) goes to vLLM's LLM,
but for `new_tokens` (1), `streams` (false) and `image_prompt`. Writes OUT/NAME.json: `logprobs` of every token of the texts given
those before it, `greedy` tokens that follow, or `refused` with the error; {} as long as it is at work, so that is left where the
process died of a checkpoint. With `streams` also OUT/NAME.safetensors: `streams` float32 [blocks + 1, length, hidden], the
residual stream of the first text before the first decoder block and behind every one. With `image_prompt`, a text that names an
image, also `image` {ids, logprobs, greedy} of it and of `image` uint8 [height, width, 3] in tokens.safetensors. The only module
of foem_eval that imports vLLM: it is always run as a process of its own.
"""
from __future__ import annotations

import gc
import json
import os
import pathlib
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402

registry._run_in_subprocess = lambda look: look()  # at a model's class: another process would import everything again


def watch(model: torch.nn.Module) -> None:
    """Keep the streams of every forward pass, until the next one, in `model.streams`."""
    def before(_, arguments):
        model.streams = [arguments[1].float().clone()]  # (positions, hidden states, ...), which may be computed in place

    def behind(_, arguments, outputs):
        model.streams.append(sum(part.float() for part in (outputs if isinstance(outputs, tuple) else (outputs,))))

    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    blocks[0].register_forward_pre_hook(before)
    for block in blocks:
        block.register_forward_hook(behind)


def streams(model: torch.nn.Module) -> torch.Tensor:
    return torch.stack(model.streams)


def answer(output) -> dict[str, list[int] | list[float]]:
    ids = list(output.prompt_token_ids)
    return {"ids": ids, "logprobs": [chances[token].logprob for token, chances in zip(ids[1:], output.prompt_logprobs[1:])],
            "greedy": list(output.outputs[0].token_ids)}


def serve(checkpoint: pathlib.Path, options: dict, tokens: dict[str, torch.Tensor], record: pathlib.Path) -> dict:
    options, texts = dict(options), tokens["texts"].tolist()
    new_tokens, watched = options.pop("new_tokens", 1), options.pop("streams", False)
    image_prompt = options.pop("image_prompt", None)
    length = len(texts[0]) + new_tokens + 7
    llm = LLM(str(checkpoint), max_model_len=length, max_num_seqs=len(texts), seed=0, max_num_batched_tokens=len(texts) * length,
              num_gpu_blocks_override=8 * len(texts), **{"enforce_eager": True, **options})
    asked = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=0)
    answers = [answer(o) for o in llm.generate([{"prompt_token_ids": ids} for ids in texts], asked, use_tqdm=False)]
    found = {key: [a[key] for a in answers] for key in ("logprobs", "greedy")}
    if image_prompt:
        request = {"prompt": image_prompt, "multi_modal_data": {"image": tokens["image"].numpy()}}
        found["image"] = answer(llm.generate(request, asked, use_tqdm=False)[0])
    if watched:
        llm.apply_model(watch)
        llm.generate([{"prompt_token_ids": texts[0]}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        save_file({"streams": llm.apply_model(streams)[0]}, record)
    return found


def reason(error: BaseException) -> str:
    """The message of the innermost exception: vLLM wraps some."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"{type(error).__name__}: {error}"


def main() -> None:
    folder, out, options = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
    tokens = load_file(folder / "tokens.safetensors")
    for name in sys.argv[4:]:
        result = out / f"{name}.json"
        result.write_text("{}")
        try:
            found = serve(folder / name, options, tokens, out / f"{name}.safetensors")
        except Exception as error:  # whatever it is, it is why vLLM does not serve this checkpoint
            found = {"refused": reason(error)}
        result.write_text(json.dumps(found))
        gc.collect()
    # vLLM 0.32 now and then aborts in its own shutdown, when everything asked for is long written.
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
