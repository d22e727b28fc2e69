"""What else the OpenAI API offers, on the server of test_serving.py; then the server is killed and started again, with adapters.

The expectations are transformers' on the dequantized weights in float32 (log-probabilities, masked greedy choices, weights with
an adapter added), jsonschema's, and the tokenizer's own chat template. See serving.py for the tolerance.
"""
from __future__ import annotations

import json
import pathlib
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

sys.path.append(str(pathlib.Path(__file__).parents[1] / "kernels"))

import bench_serve  # noqa: E402
from serving import CHUNK, NEW_TOKENS, TOGETHER, Dense, documents, same_up_to_ties  # noqa: E402

IDS = {"return_tokens_as_token_ids": True, "return_token_ids": True}
MESSAGES = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is a tensor?"},
            {"role": "assistant", "content": "An array."}, {"role": "user", "content": "And a scalar?"}]
SCHEMA = {"type": "object", "additionalProperties": False, "required": ["name", "size", "kind"],
          "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer", "minimum": 1, "maximum": 64},
                         "kind": {"enum": ["tensor", "scalar"]}}}
LORA_TARGETS = {"everywhere": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                "partly": ("q_proj", "down_proj")}  # of fused modules one only
RANK, ALPHA = 8, 16


@pytest.fixture(scope="module")
def exact(dense) -> Dense:
    return dense["sym"]


@pytest.fixture(scope="module")
def tokenizer(folders):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folders["sym"])


def complete(client, prompt, model: str = "tinylm", **options):
    """One completion, greedy unless `options` say otherwise."""
    extra = options.pop("extra_body", {})
    return client.completions.create(model=model, prompt=prompt, **{"temperature": 0, "max_tokens": NEW_TOKENS, "logprobs": 2,
                                                                    "extra_body": {**extra, "return_token_ids": True}, **options})


def token(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def test_top_logprobs_are_those_of_transformers(client, prompts, exact):
    choice = complete(client, prompts[5], logprobs=5, extra_body=IDS).choices[0]
    expected = exact.all(choice.prompt_token_ids + choice.token_ids)[len(choice.prompt_token_ids) - 1:-1]
    for found, row in zip(choice.logprobs.top_logprobs, expected, strict=True):
        ids = torch.tensor([token(name) for name in found])
        assert len(ids) == 5 and float((torch.tensor(list(found.values())) - row[ids]).abs().max()) < exact.tolerance
        # Five as good as the best five; both sides of the comparison may be off by the tolerance.
        assert float(row.topk(5).values[-1] - row[ids].min()) < 2 * exact.tolerance


def test_long_prompts_are_computed_in_chunks_and_cached(server, client, exact):
    """Echoed log-probabilities of a prompt of two chunks; asked again, most of it comes from the cache and changes nothing."""
    assert f"Chunked prefill is enabled with max_num_batched_tokens={CHUNK}" in server.said()
    ids = complete(client, documents()[40][:1200], max_tokens=1).choices[0].prompt_token_ids
    assert CHUNK + 100 < len(ids) < 480
    echoed = complete(client, ids, echo=True, max_tokens=1).choices[0].logprobs.token_logprobs
    assert float((torch.tensor(echoed[1:-1]) - exact.chosen(ids)).abs().max()) < exact.tolerance
    server.post("/reset_prefix_cache")
    hits = server.metric("vllm:prefix_cache_hits_total")
    first, again, other = (complete(client, asked) for asked in (ids, ids, ids[:300] + ids[:40]))
    cached = [made.usage.prompt_tokens_details.cached_tokens or 0 for made in (first, again, other)]
    assert cached[0] == 0 and cached[1] >= CHUNK and 0 < cached[2] <= 300
    assert server.metric("vllm:prefix_cache_hits_total") - hits == sum(cached)
    assert same_up_to_ties(first.choices[0], again.choices[0], exact.tolerance)
    for choice in (first.choices[0], again.choices[0], other.choices[0]):
        assert exact.regret(choice.prompt_token_ids, choice.token_ids) < exact.tolerance


def test_chat_is_a_completion_of_the_template(client, tokenizer):
    asked = dict(model="tinylm", messages=MESSAGES, temperature=0, max_tokens=NEW_TOKENS)
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, extra_body={"return_token_ids": True})
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert whole.prompt_token_ids == ids
    plain = complete(client, ids).choices[0]
    assert plain.text == whole.choices[0].message.content and plain.finish_reason == whole.choices[0].finish_reason
    assert [t.logprob for t in whole.choices[0].logprobs.content] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-3)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == plain.text
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (len(ids), len(plain.token_ids))


def test_several_samples_of_one_prompt(client, prompts, exact):
    """n > 1: repeatable by the seed, each with the log-probabilities of transformers, drawn as often as those say."""
    made = [complete(client, prompts[1], n=3, temperature=1, seed=7) for _ in range(2)]
    assert [c.text for c in made[0].choices] == [c.text for c in made[1].choices]
    assert len({c.text for c in made[0].choices}) == 3 and [c.index for c in made[0].choices] == [0, 1, 2]
    prompt = made[0].choices[0].prompt_token_ids
    for choice in made[0].choices:
        expected = exact.chosen(prompt + choice.token_ids)[len(prompt) - 1:]
        assert float((torch.tensor(choice.logprobs.token_logprobs) - expected).abs().max()) < exact.tolerance
    # A step holds whole prompts only: seeded ones that are cut stop vLLM's CPU engine ("CPU Generator does not use offset").
    short, n = prompt[: CHUNK // TOGETHER], 4 * TOGETHER
    drawn = [c.token_ids[0] for c in complete(client, short, n=n, temperature=1, seed=1, max_tokens=1).choices]
    best = exact.all(short)[-1].exp().max(0)
    assert abs(drawn.count(int(best.indices)) - n * best.values) < 4 * (n * best.values * (1 - best.values)) ** 0.5
    with pytest.raises(openai.BadRequestError, match="greedy"):
        complete(client, prompts[1], n=2)


def test_stop_strings(client, prompts):
    """The text ends before the stop string, or behind it if that is asked for; streamed text never shows the string's start."""
    whole = complete(client, prompts[6]).choices[0].text
    stop = whole[8:11]  # in the middle of tokens, or across them
    expected = whole[: whole.index(stop)]
    cut = complete(client, prompts[6], stop=["never said", stop]).choices[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (expected, "stop", stop)
    with_it = complete(client, prompts[6], stop=[stop], extra_body={"include_stop_str_in_output": True}).choices[0]
    assert with_it.text == expected + stop
    assert "".join(c.choices[0].text for c in complete(client, prompts[6], stop=[stop], stream=True)) == expected


def best_choice(exact: Dense, tokenizer, prompt: list[int], choices: list[str]) -> tuple[str, float]:
    """What greedy decoding says when only beginnings of `choices` are allowed; how far its closest second token was behind."""
    words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    said, ids, gap = "", list(prompt), float("inf")
    while said not in choices:
        allowed = torch.tensor([i for i, word in enumerate(words) if word and any(c.startswith(said + word) for c in choices)])
        best = exact.all(ids)[-1][allowed].topk(min(2, len(allowed)))
        if len(allowed) > 1:
            gap = min(gap, float(best.values[0] - best.values[1]))
        ids.append(int(allowed[best.indices[0]]))
        said += words[ids[-1]]
    return said, gap


def test_guided_answers(client, prompts, exact, tokenizer):
    jsonschema = pytest.importorskip("jsonschema")
    asked = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    said = client.chat.completions.create(model="tinylm", messages=MESSAGES, temperature=0, max_tokens=100, response_format=asked)
    assert said.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(said.choices[0].message.content), SCHEMA)
    pattern = "[0-9]{3}-[a-f]{4}"
    found = complete(client, prompts[3], extra_body={"structured_outputs": {"regex": pattern}}).choices[0].text
    assert re.fullmatch(pattern, found)
    decided = 0
    for prompt, choices in ((prompts[3], ["yes", "no", "perhaps"]), (prompts[7], ["red", "green", "blue"])):
        choice = complete(client, prompt, extra_body={"structured_outputs": {"choice": choices}}).choices[0]
        expected, gap = best_choice(exact, tokenizer, choice.prompt_token_ids, choices)
        decided += gap > exact.tolerance
        assert choice.text == expected or gap < exact.tolerance
    assert decided


def requests(client, prompts) -> list:
    """A full step of requests of many kinds; each a function of no arguments that returns a choice with log-probabilities."""
    kinds = ({}, {"stop": ["\n"]}, {"extra_body": {"structured_outputs": {"regex": "[a-z ]{6,30}"}}}, {"max_tokens": 7},
             {"presence_penalty": 0.5}, {"extra_body": {"min_tokens": 20}}, {"extra_body": {"top_k": 1}, "temperature": 1}, {})
    asked = [(prompt, kinds[i % len(kinds)]) for i, prompt in enumerate(prompts)]
    return [lambda p=p, options=options: complete(client, p, **dict(options)).choices[0] for p, options in asked]


def test_thirty_two_of_many_kinds_at_once(client, prompts, exact):
    """No request gets another's grammar, penalties, stop strings or sampling."""
    made = requests(client, prompts)
    alone = [ask() for ask in made]
    with ThreadPoolExecutor(TOGETHER) as pool:
        together = list(pool.map(lambda ask: ask(), made))
    assert all(same_up_to_ties(a, b, exact.tolerance) for a, b in zip(alone, together, strict=True))
    equal = sum((a.text, a.finish_reason) == (b.text, b.finish_reason) for a, b in zip(alone, together))
    print(f"{equal} of {len(made)} answers are equal to the letter")
    assert equal >= 24


def test_bad_and_abandoned_requests_leave_nothing_behind(server, client, prompts):
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        complete(client, "word " * 600)
    with pytest.raises(openai.NotFoundError):
        complete(client, "x", model="another")
    with pytest.raises(openai.BadRequestError):
        complete(client, "x", extra_body={"structured_outputs": {"regex": "[a-"}})
    for prompt in prompts[:8]:
        stream = complete(client, prompt, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    for _ in range(50):
        if not server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
            break
        time.sleep(0.1)
    else:
        pytest.fail("abandoned requests are still running")


def test_sleep_is_only_a_pause_on_a_cpu(server, client, prompts, one_by_one):
    """vLLM's CPU worker keeps the memory and says so; the plugin is not asked. What it served before it serves afterwards."""
    server.post("/sleep?level=1")
    assert json.loads(server.get("/is_sleeping")) == {"is_sleeping": True}
    server.post("/wake_up")
    assert "sleep mode is not supported on CPU" in server.said()
    assert complete(client, prompts[4]).choices[0].text == one_by_one[4].text


def test_vllm_bench_serve(server, tmp_path):
    """vLLM's own load generator gets every answer in full, and kernels/bench_serve.py reads its report."""
    row = bench_serve.bench(server.url, "tinylm", TOGETHER, 2 * TOGETHER, tmp_path, prompt=40, output=12)
    assert row["together"] == TOGETHER and row["completed"] == 2 * TOGETHER and row["total_output_tokens"] == 24 * TOGETHER
    assert 0 < row["median_ttft_ms"] < 1000 * row["duration"] and row["output_throughput"] > 0


def write_adapter(folder: pathlib.Path, model: pathlib.Path, targets: tuple[str, ...], seed: int) -> pathlib.Path:
    """A PEFT adapter of random weights for the linears of `model` (dense, one file) called `targets`."""
    tensors, generator = {}, torch.Generator().manual_seed(seed)
    for name, w in load_file(model / "model.safetensors").items():
        if name.split(".")[-2] in targets:
            stem, (n, k) = f"base_model.model.{name.removesuffix('.weight')}", w.shape
            tensors[f"{stem}.lora_A.weight"] = (torch.randn(RANK, k, generator=generator) / k**0.5).bfloat16()
            tensors[f"{stem}.lora_B.weight"] = (torch.randn(n, RANK, generator=generator) / 20).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
              "target_modules": list(targets), "base_model_name_or_path": "tinylm"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_merged(out: pathlib.Path, model: pathlib.Path, adapter: pathlib.Path) -> pathlib.Path:
    """out/dense: `model` with W + alpha / r B A, in float32."""
    shutil.copytree(model, out / "dense")
    tensors, parts = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in parts if ".lora_A." in name]:
        weight = f"{name.removeprefix('base_model.model.').removesuffix('.lora_A.weight')}.weight"
        tensors[weight] += ALPHA / RANK * (parts[name.replace("lora_A", "lora_B")].float() @ parts[name].float())
    save_file(tensors, out / "dense/model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(root / name, folders["sym"] / "dense", targets, seed)
            for seed, (name, targets) in enumerate(LORA_TARGETS.items())}


@pytest.fixture(scope="module")
def restarted(server, one_by_one, adapters):
    """The server after SIGKILL in the middle of its work, started again at the same address, now with adapters."""
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    stream = complete(client, "def f(", max_tokens=400, n=8, temperature=1, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))  # of 3200 tokens, so that a fast machine is not done before it is killed
    server.kill()
    with pytest.raises(openai.APIConnectionError):
        list(stream)
    # One slot more than adapters: on CPUs vLLM gives requests of the base model whatever lies in the last slot.
    server.start("--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", str(len(adapters) + 1),
                 "--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items()))
    return server


def test_killed_and_started_again_it_answers_the_same(restarted, client, prompts, one_by_one, exact):
    for prompt, before in zip(prompts[:12], one_by_one):
        assert same_up_to_ties(before, complete(client, prompt).choices[0], exact.tolerance)


def test_adapters_on_quantized_weights(restarted, client, prompts, folders, adapters, answers, exact, tmp_path):
    """Alone and in one batch with the other adapter and the base model: log-probabilities of W + alpha / r BA, in float32."""
    asked = [(prompt, model) for prompt in prompts[3:7] for model in ("tinylm", *adapters)]
    alone = [complete(client, prompt, model).choices[0] for prompt, model in asked]
    with ThreadPoolExecutor(TOGETHER) as pool:
        together = [future.choices[0] for future in pool.map(lambda job: complete(client, *job), asked)]
    merged = {name: Dense(write_merged(tmp_path / name, folders["sym"] / "dense", folder), answers["sym"]["texts"])
              for name, folder in adapters.items()}
    changed = set()
    for (_, model), *both in zip(asked, alone, together, strict=True):
        reference = merged.get(model, exact)
        for choice in both:
            ids, answer = choice.prompt_token_ids, choice.token_ids
            expected = reference.chosen(ids + answer)[len(ids) - 1:]
            assert float((torch.tensor(choice.logprobs.token_logprobs) - expected).abs().max()) < reference.tolerance
            assert reference.regret(ids, answer) < reference.tolerance
            changed |= {model} if exact.regret(ids, answer) > exact.tolerance else set()
    assert changed == set(adapters)  # both matter: what they answer is wrong for the base model
