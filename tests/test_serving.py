"""Serving through real vLLM: the OpenAI server with --quantization foem, and every variant of the format against transformers.

Equality is up to rounding: activations are bf16, so tokens whose log-probabilities differ by less than `tolerance` may swap.
The tolerance is not a guess: it is twice the largest difference that transformers itself shows between bf16 and float32 on
the same dequantized weights. Twice, because vLLM rounds at other places, independently.
"""
from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

from checkpoints import edit_config, write_rtn_checkpoint  # noqa: E402
from foem_eval.dequantized import write_dequantized  # noqa: E402
from tiny_models import CALIBRATION  # noqa: E402

from foem_vllm import QuantizeConfig, quantize  # noqa: E402
from foem_vllm.format import QuantSpec  # noqa: E402

HERE = pathlib.Path(__file__).parent
ENV = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
VARIANTS = {
    "sym": (QuantSpec(4, 128), "gptq", {}, "foem"),  # what `foem quantize` writes
    "stock": (QuantSpec(4, 128), "gptq", {}, "gptq"),  # the same weights through vLLM's own GPTQ
    "asym": (QuantSpec(4, 32, False), "gptq", {}, "foem"),
    "asym_v2": (QuantSpec(4, 64, False), "gptq_v2", {}, "foem"),
    "act_order": (QuantSpec(4, 64, True, "full"), "gptq", {}, "foem"),
    "act_order_asym": (QuantSpec(4, 128, False, "full"), "gptq_v2", {}, "foem"),
    "per_row": (QuantSpec(4, -1, False), "gptq", {}, "foem"),
    "int8": (QuantSpec(8, 64), "gptq", {}, "foem"),
    "mixed": (QuantSpec(4, 64), "gptq", {"dynamic": {r"-:.*layers\.0\.mlp": {}, r".*layers\.1\.self_attn": {"bits": 8}}}, "foem"),
    "own": (QuantSpec(4, 64), "gptq", {"foem": True, "lm_head": True}, None),  # claimed without any flag
}
NEW_TOKENS = 24


def documents() -> list[str]:
    lines = (HERE.parent / "eval" / "tinylm" / "data" / "evaluation.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[:16]]


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Sixteen beginnings of held-out documents, of mixed length."""
    return [text[: 20 + 45 * i] for i, text in enumerate(documents())]


@pytest.fixture(scope="session")
def folders(tinylm, tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("served")
    out = {name: write_rtn_checkpoint(tinylm, root / name, spec, kind, **options)
           for name, (spec, kind, options, _) in VARIANTS.items() if name not in ("sym", "stock")}
    # The everyday case comes from the quantizer itself, and is served by both engines.
    quantize(tinylm, root / "sym", QuantizeConfig(method="foem", calibration=str(CALIBRATION), samples=32,
                                                     seq_len=256, device="cpu"))
    write_dequantized(root / "sym", root / "sym/dense", torch.float32)
    return {**out, "sym": root / "sym", "stock": root / "sym"}


@pytest.fixture(scope="session")
def answers(folders, prompts, tmp_path_factory) -> dict[str, dict]:
    """Every variant through one offline process (see offline_llm.py). Depends on nothing that the server holds."""
    out = tmp_path_factory.mktemp("offline") / "answers"
    jobs = [{"model": str(folders[name]), **({"quantization": flag} if flag else {})} for name, (*_, flag) in VARIANTS.items()]
    asked = {"prompts": prompts[:4], "texts": [t[:600] for t in documents()[:3]], "max_tokens": NEW_TOKENS}
    done = subprocess.run([sys.executable, str(HERE / "offline_llm.py"), json.dumps(jobs), json.dumps(asked), str(out)],
                          env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = dict(zip(VARIANTS, map(json.loads, out.read_text().splitlines())))
    return {**found, "log": done.stdout + done.stderr}


class Dense:
    """transformers with the dequantized weights of one checkpoint, in float32, and how far bf16 moves it."""

    def __init__(self, folder: pathlib.Path, texts: list[list[int]]):
        from transformers import AutoModelForCausalLM
        self.model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
        exact = [self.chosen(ids) for ids in texts]
        rounded = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.bfloat16).eval()
        self.logprobs = exact
        self.tolerance = 2 * max(float((self.chosen(ids, rounded) - e).abs().max()) for ids, e in zip(texts, exact))

    @torch.no_grad()
    def all(self, ids: list[int], model=None) -> torch.Tensor:
        return (model or self.model)(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def chosen(self, ids: list[int], model=None) -> torch.Tensor:
        """[len - 1]: log-probability of every token given those before it."""
        return self.all(ids, model)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    def regret(self, prompt: list[int], answer: list[int]) -> float:
        """How much less probable than the best token the worst token of a greedy answer is; 0 for an exact one."""
        logprobs = self.all(prompt + answer)[len(prompt) - 1:-1]
        return float((logprobs.max(1).values - logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]).max())


@pytest.fixture(scope="session")
def dense(folders, answers) -> dict[str, Dense]:
    return {name: Dense(folders[name], answers[name]["texts"]) for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_agrees_with_transformers(name, answers, dense):
    answer, exact = answers[name], dense[name]
    assert exact.tolerance < 0.5  # the yardstick itself must mean something: log-probabilities here spread over 10
    for found, expected in zip(answer["logprobs"], exact.logprobs):
        assert float((torch.tensor(found) - expected).abs().max()) < exact.tolerance
    for prompt, greedy in zip(answer["prompts"], answer["greedy"]):
        assert len(greedy) == NEW_TOKENS and exact.regret(prompt, greedy) < exact.tolerance


def test_variants_took_the_intended_path(answers):
    assert [answers[name]["quantization"] for name in VARIANTS] == ["auto_gptq" if n == "stock" else "foem" for n in VARIANTS]
    assert "foem kernel cpu_w4a16 for 4-bit group 128 symmetric on cpu torch.bfloat16" in answers["log"]
    assert "foem kernel cpu_w4a16 for 8-bit" in answers["log"] and "slow" not in answers["log"]
    assert "1 file(s) of" in answers["log"]


def test_foem_and_stock_gptq_agree(answers, dense):
    """Same weights, both kernels: log-probabilities of the same text differ by rounding only."""
    for a, b in zip(answers["sym"]["logprobs"], answers["stock"]["logprobs"]):
        assert float((torch.tensor(a) - torch.tensor(b)).abs().max()) < dense["sym"].tolerance


@pytest.fixture(scope="session")
def server(folders, answers, tmp_path_factory):
    """One `vllm serve DIR --quantization foem`; after `answers`, so that two engines never run at once. Yields its URL."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [str(pathlib.Path(sys.executable).with_name("vllm")), "serve", str(folders["sym"]), "--quantization", "foem",
               "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16", "--host", "127.0.0.1", "--port", str(port),
               "--served-model-name", "tinylm"]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=ENV, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-4000:])
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="session")
def one_by_one(server, prompts):
    """Greedy answers to every prompt, alone on the server, as the client returns them, with token ids."""
    client = openai.OpenAI(base_url=server[0], api_key="none")
    return [client.completions.create(model="tinylm", prompt=p, temperature=0, max_tokens=NEW_TOKENS, logprobs=2,
                                      extra_body={"return_token_ids": True}).choices[0] for p in prompts]


def same_up_to_ties(a, b, tolerance: float) -> bool:
    """Equal tokens, or a first difference where the two best tokens were as good as equal; what follows is then another text."""
    for i, (x, y) in enumerate(zip(a.logprobs.tokens, b.logprobs.tokens)):
        if abs(a.logprobs.token_logprobs[i] - b.logprobs.token_logprobs[i]) > tolerance:
            return False
        if x != y:
            best = sorted(a.logprobs.top_logprobs[i].values(), reverse=True)
            return best[0] - best[1] < tolerance and y in a.logprobs.top_logprobs[i]
    return len(a.logprobs.tokens) == len(b.logprobs.tokens)


def test_completions_are_greedy_for_transformers(one_by_one, dense):
    """The server's tokens, and the log-probabilities that it reports, are those of transformers."""
    exact = dense["sym"]
    for choice in one_by_one:
        prompt, answer = choice.prompt_token_ids, choice.token_ids
        assert answer and exact.regret(prompt, answer) < exact.tolerance
        expected = exact.chosen(prompt + answer)[len(prompt) - 1:]
        assert float((torch.tensor(choice.logprobs.token_logprobs) - expected).abs().max()) < exact.tolerance


def test_sixteen_at_once_streaming_and_not(server, prompts, one_by_one, dense):
    """Batches of mixed lengths answer what each request gets alone: no request sees another's rows, cache or padding."""
    client = openai.AsyncOpenAI(base_url=server[0], api_key="none")

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
    assert equal >= 12


def test_chat_and_streamed_chat(server):
    client = openai.OpenAI(base_url=server[0], api_key="none")
    asked = dict(model="tinylm", messages=[{"role": "user", "content": "Tell me about tensors."}], temperature=0,
                 max_tokens=NEW_TOKENS)
    whole = client.chat.completions.create(**asked)
    assert whole.usage.completion_tokens > 0 and whole.choices[0].finish_reason in ("stop", "length")
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content


def test_server_log_names_the_kernel(server):
    assert "foem kernel cpu_w4a16 for 4-bit group 128 symmetric" in server[1].read_text()


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
