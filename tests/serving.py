"""What serving tests share: checkpoints of every form, their answers offline, the server, transformers as the reference.

Equality is up to rounding: activations are bf16, so tokens whose log-probabilities differ by less than `tolerance` may swap.
The tolerance is not a guess: it is twice the largest difference that transformers itself shows between bf16 and float32 on
the same dequantized weights. Twice, because vLLM rounds at other places, independently.
"""
from __future__ import annotations

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from checkpoints import write_rtn_checkpoint
from foem_eval import processes
from foem_eval.dequantized import write_dequantized
from tiny_models import CALIBRATION, EVALUATION

from foem_vllm import stock
from foem_vllm.format import QuantSpec

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
SERVED = [name for name in VARIANTS if name != "stock" or stock.multiplies()]
NEW_TOKENS = 24
CHUNK = 256  # tokens that the server computes in one step: longer prompts are cut
TOGETHER = 32  # requests in one step
GUIDED = {"backend": "xgrammar", "disable_any_whitespace": True}  # a small model would answer with white space for ever


@functools.cache
def documents() -> tuple[str, ...]:
    """Held-out documents, two for every request of a full step."""
    lines = EVALUATION.read_text("utf-8").splitlines()
    return tuple(json.loads(line)["text"] for line in lines[: 2 * TOGETHER])


class Dense:
    """transformers with the dequantized weights of one checkpoint, in float32, and how far bf16 moves it.

    folder: a checkpoint with its dequantized weights in folder/dense. texts: token ids to measure the tolerance on.
    """

    def __init__(self, folder: pathlib.Path, texts: list[list[int]]):
        from transformers import AutoModelForCausalLM
        self.model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
        exact = [self.chosen(ids) for ids in texts]
        rounded = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.bfloat16).eval()
        self.logprobs = exact
        self.tolerance = 2 * max(float((self.chosen(ids, rounded) - e).abs().max()) for ids, e in zip(texts, exact))

    @torch.no_grad()
    def all(self, ids: list[int], model=None) -> torch.Tensor:
        """[len, vocabulary]: log-probabilities of what comes after every token."""
        return (model or self.model)(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def chosen(self, ids: list[int], model=None) -> torch.Tensor:
        """[len - 1]: log-probability of every token given those before it."""
        return self.all(ids, model)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    def regret(self, prompt: list[int], answer: list[int]) -> float:
        """How much less probable than the best token the worst token of a greedy answer is; 0 for an exact one."""
        logprobs = self.all(prompt + answer)[len(prompt) - 1:-1]
        return float((logprobs.max(1).values - logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]).max())


def same_up_to_ties(a, b, tolerance: float) -> bool:
    """Equal tokens, or a first difference where the two best tokens were as good as equal; what follows is then another text."""
    for i, (x, y) in enumerate(zip(a.logprobs.tokens, b.logprobs.tokens)):
        if abs(a.logprobs.token_logprobs[i] - b.logprobs.token_logprobs[i]) > tolerance:
            return False
        if x != y:
            best = sorted(a.logprobs.top_logprobs[i].values(), reverse=True)
            return best[0] - best[1] < tolerance and y in a.logprobs.top_logprobs[i]
    return len(a.logprobs.tokens) == len(b.logprobs.tokens)


class Server:
    """One `vllm serve DIR --quantization foem` at `url`; can be killed and started again at the same address."""

    def __init__(self, folder: pathlib.Path, logs: pathlib.Path):
        self.folder, self.logs, self.port, self.starts = folder, logs, processes.free_port(), 0
        self.root = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.root}/v1"

    def start(self, *arguments: str) -> None:
        """Returns when the server answers."""
        command = [processes.tool("vllm"), "serve", str(self.folder), "--quantization", "foem", "--enforce-eager",
                   "--max-model-len", "512", "--max-num-seqs", str(TOGETHER), "--max-num-batched-tokens", str(CHUNK),
                   "--enable-prompt-tokens-details", "--structured-outputs-config", json.dumps(GUIDED), "--host", "127.0.0.1",
                   "--port", str(self.port), "--served-model-name", "tinylm", *arguments]
        self.starts += 1
        self.log = self.logs / f"log{self.starts}"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, env={**ENV, "VLLM_SERVER_DEV_MODE": "1"}, stdout=file,
                                            stderr=subprocess.STDOUT, start_new_session=True)
        for _ in range(600):
            assert self.process.poll() is None, self.said()[-4000:]
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(self.said()[-4000:])

    def said(self) -> str:
        return self.log.read_text()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.root + path, timeout=20) as answer:
            return answer.read().decode()

    def post(self, path: str) -> str:
        with urllib.request.urlopen(urllib.request.Request(self.root + path, b"", method="POST"), timeout=20) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """The value of one of vLLM's counters, summed over its labels."""
        return sum(float(line.rsplit(" ", 1)[1]) for line in self.get("/metrics").splitlines() if line.startswith(name + "{"))

    def kill(self) -> None:
        """SIGKILL to the process that was started, as the kernel does when memory runs out; then what it leaves is stopped."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        self.stop()

    def stop(self) -> None:
        processes.stop_group(self.process)


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Beginnings of held-out documents, of mixed length."""
    return [text[: 20 + 45 * (i % 16)] for i, text in enumerate(documents()[:TOGETHER])]


@pytest.fixture(scope="session")
def folders(tinylm, tmp_path_factory) -> dict[str, pathlib.Path]:
    """{variant: checkpoint}, with the dequantized weights in its folder `dense`."""
    from foem_vllm import QuantizeConfig, quantize
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
    flags = {name: VARIANTS[name][-1] for name in SERVED}
    jobs = [{"model": str(folders[name]), **({"quantization": flag} if flag else {})} for name, flag in flags.items()]
    asked = {"prompts": prompts[:4], "texts": [t[:600] for t in documents()[:3]], "max_tokens": NEW_TOKENS}
    script = str(pathlib.Path(__file__).with_name("offline_llm.py"))
    done = subprocess.run([sys.executable, script, json.dumps(jobs), json.dumps(asked), str(out)],
                          env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = dict(zip(SERVED, map(json.loads, out.read_text().splitlines())))
    return {**found, "log": done.stdout + done.stderr}


@pytest.fixture(scope="session")
def dense(folders, answers) -> dict[str, Dense]:
    return {name: Dense(folders[name], answers[name]["texts"]) for name in SERVED}


@pytest.fixture(scope="session")
def server(folders, answers, tmp_path_factory):
    """The server of the everyday case; after `answers`, so that two engines never run at once."""
    found = Server(folders["sym"], tmp_path_factory.mktemp("server"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="session")
def client(server):
    import openai
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def one_by_one(client, prompts):
    """Greedy answers to every prompt, alone on the server, as the client returns them, with token ids."""
    return [client.completions.create(model="tinylm", prompt=p, temperature=0, max_tokens=NEW_TOKENS, logprobs=2,
                                      extra_body={"return_token_ids": True}).choices[0] for p in prompts]
