"""Serving through real vLLM: every variant of the format against transformers, and the server with --quantization foem."""
from __future__ import annotations

import asyncio
import json
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

from checkpoints import edit_config, write_rtn_checkpoint  # noqa: E402
from serving import ENV, NEW_TOKENS, SERVED, VARIANTS, same_up_to_ties  # noqa: E402

from foem_vllm.format import QuantSpec  # noqa: E402

HERE = pathlib.Path(__file__).parent
# Stock vLLM's kernel rounds twice as much as bfloat16 on CPUs with AMX (NOTES.md): twice what is asked of ours.
STOCK_ROUNDING = 2 if torch.cpu._is_amx_tile_supported() else 1

STOCK = pytest.mark.skipif("stock" not in SERVED, reason="stock vLLM has no 4-bit kernel for a CPU without AVX-512")


@pytest.mark.parametrize("name", [pytest.param(name, marks=STOCK if name == "stock" else ()) for name in VARIANTS])
def test_every_variant_agrees_with_transformers(name, answers, dense):
    answer, exact = answers[name], dense[name]
    tolerance = exact.tolerance * (STOCK_ROUNDING if name == "stock" else 1)
    assert exact.tolerance < 0.5  # the yardstick itself must mean something: log-probabilities here spread over 10
    for found, expected in zip(answer["logprobs"], exact.logprobs):
        assert float((torch.tensor(found) - expected).abs().max()) < tolerance
    for prompt, greedy in zip(answer["prompts"], answer["greedy"]):
        assert len(greedy) == NEW_TOKENS and exact.regret(prompt, greedy) < tolerance


def test_variants_took_the_intended_path(answers):
    assert [answers[name]["quantization"] for name in SERVED] == ["auto_gptq" if n == "stock" else "foem" for n in SERVED]
    assert "foem kernel cpu_w4a16 for 4-bit group 128 symmetric on cpu torch.bfloat16" in answers["log"]
    assert "foem kernel cpu_w4a16 for 8-bit" in answers["log"] and "slow" not in answers["log"]
    assert "1 file(s) of" in answers["log"]


@STOCK
def test_foem_and_stock_gptq_agree(answers, dense):
    """Same weights, both kernels: log-probabilities of the same text differ by rounding only."""
    for a, b in zip(answers["sym"]["logprobs"], answers["stock"]["logprobs"]):
        assert float((torch.tensor(a) - torch.tensor(b)).abs().max()) < STOCK_ROUNDING * dense["sym"].tolerance


def test_completions_are_greedy_for_transformers(one_by_one, dense):
    """The server's tokens, and the log-probabilities that it reports, are those of transformers."""
    exact = dense["sym"]
    for choice in one_by_one:
        prompt, answer = choice.prompt_token_ids, choice.token_ids
        assert answer and exact.regret(prompt, answer) < exact.tolerance
        expected = exact.chosen(prompt + answer)[len(prompt) - 1:]
        assert float((torch.tensor(choice.logprobs.token_logprobs) - expected).abs().max()) < exact.tolerance


def test_thirty_two_at_once_streaming_and_not(server, prompts, one_by_one, dense):
    """Batches of mixed lengths answer what each request gets alone: no request sees another's rows, cache or padding."""
    client = openai.AsyncOpenAI(base_url=server.url, api_key="none")

    async def ask(prompt, stream):
        made = client.completions.create(model="tinylm", prompt=prompt, temperature=0, max_tokens=NEW_TOKENS, logprobs=2,
                                         stream=stream)
        if not stream:
            return (await made).choices[0]
        whole = None
        async for chunk in await made:
            choice = chunk.choices[0]
            if whole is None:
                whole = choice
            elif choice.logprobs:
                whole.text += choice.text
                for part in ("tokens", "token_logprobs", "top_logprobs"):
                    getattr(whole.logprobs, part).extend(getattr(choice.logprobs, part))
        return whole

    async def all_of_them():
        return await asyncio.gather(*(ask(p, stream=i % 2 == 0) for i, p in enumerate(prompts)))

    found = asyncio.run(all_of_them())
    assert all(same_up_to_ties(a, b, dense["sym"].tolerance) for a, b in zip(one_by_one, found))
    # A tie here and there, not everywhere: most answers are equal to the letter.
    equal = sum(a.text == b.text for a, b in zip(one_by_one, found))
    print(f"{equal} of {len(found)} answers are equal to the letter")
    assert equal >= 24


def test_chat_and_streamed_chat(client):
    asked = dict(model="tinylm", messages=[{"role": "user", "content": "Tell me about tensors."}], temperature=0,
                 max_tokens=NEW_TOKENS)
    whole = client.chat.completions.create(**asked)
    assert whole.usage.completion_tokens > 0 and whole.choices[0].finish_reason in ("stop", "length")
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content


def test_server_log_names_the_kernel(server):
    assert "foem kernel cpu_w4a16 for 4-bit group 128 symmetric" in server.said()


@pytest.mark.parametrize("damage,env,said", [
    ("flip", {}, "model.safetensors has sha256"),
    ("kernel", {"FOEM_KERNEL": "triton_w4a16"}, "unset FOEM_KERNEL"),
])
def test_engine_refuses_in_one_line(damage, env, said, tinylm, tmp_path):
    """Through the whole engine: the reason and the remedy are in its output, and it does not exit with 0."""
    folder = write_rtn_checkpoint(tinylm, tmp_path / "bad", QuantSpec(4, 64), foem=True)
    if damage == "flip":
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    else:
        edit_config(folder, meta={})
    jobs, asked = [{"model": str(folder), "quantization": "foem"}], {"prompts": ["x"], "texts": ["x y"], "max_tokens": 1}
    arguments = [json.dumps(jobs), json.dumps(asked), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, str(HERE / "offline_llm.py"), *arguments],
                          env={**ENV, **env}, capture_output=True, text=True, timeout=300)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if said in line]
    assert done.returncode != 0 and lines
