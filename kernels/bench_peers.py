"""Public INT4 kernels as contenders of kernels/bench.py, from a folder that holds their compiled code.

In that folder, all optional:
    vllm_C_sm90.so[.xz], vllm_scalar_type.py   Marlin and Machete: vLLM's `_C_stable_libtorch` and its vllm/scalar_type.py
    fbgemm_genai_sm90.so[.xz]                  FBGEMM: fbgemm-gpu-genai's `fbgemm_gpu_experimental_gen_ai`
    humming_kernels-*.whl                      humming: compiles at run time, with NVRTC and the toolkit's headers
    conch_triton_kernels-*.whl                 Conch: Triton

    pip download --no-deps -d FOLDER humming-kernels==0.1.19 conch-triton-kernels==1.3

Call sequences follow vLLM 0.33.0, fbgemm-gpu-genai 1.6.0, humming 0.1.19 and Conch 1.3. bf16 only.
"""
from __future__ import annotations

import functools
import importlib.util
import lzma
import pathlib
import shutil
import sys
import tempfile
import zipfile

import torch
from bench_contenders import Contender, byte_pairs, gptq_words, group_scales

BF16 = torch.bfloat16


@functools.cache
def scratch() -> pathlib.Path:
    """Where archives are unpacked; removed when the process ends."""
    scratch.folder = tempfile.TemporaryDirectory(prefix="bench-peers-")
    return pathlib.Path(scratch.folder.name)


def load_ops(folder: pathlib.Path, name: str) -> None:
    """Register the operators of NAME or NAME.xz. Raises FileNotFoundError."""
    path = folder / name
    if not path.exists():
        if not (folder / f"{name}.xz").exists():
            raise FileNotFoundError(f"no {name} or {name}.xz in {folder}")
        path = scratch() / name
        with lzma.open(folder / f"{name}.xz") as packed, path.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 22)
    torch.ops.load_library(str(path))


def add_wheel(folder: pathlib.Path, pattern: str) -> None:
    """Make the package of the newest matching wheel importable, unless it is. Unpacked: both compile files they carry."""
    if importlib.util.find_spec(pattern.partition("_")[0]) is not None:
        return
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern} in {folder}")
    target = scratch() / found[-1].stem
    with zipfile.ZipFile(found[-1]) as wheel:
        for member in wheel.infolist():
            path = pathlib.Path(wheel.extract(member, target))
            if member.external_attr >> 16 & 0o111 and path.is_file():
                path.chmod(0o755)
    sys.path.append(str(target))


def uint4b8(folder: pathlib.Path) -> int:
    """vLLM's number for "4 bits, stored + 8"."""
    path = folder / "vllm_scalar_type.py"
    spec = importlib.util.spec_from_file_location("vllm_scalar_type", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module.scalar_types.uint4b8.id


def needs(n: int, k: int, groups: tuple[int, ...]):
    def supports(p):
        if p.device != "cuda":
            return f"needs a CUDA device, not {p.device}"
        fits = p.n % n == 0 and p.k % k == 0 and p.group_size in groups
        return None if fits else f"needs N % {n} == 0, K % {k} == 0 and group_size in {groups}"
    return supports


def marlin_scales(scales: torch.Tensor) -> torch.Tensor:
    """[groups, n], several groups: within 64 columns those that one thread needs lie together (column i + 8 j at 8 i + j)."""
    return scales.view(scales.shape[0], -1, 8, 8).transpose(2, 3).reshape(scales.shape).contiguous()


def marlin(folder: pathlib.Path) -> list[Contender]:
    load_ops(folder, "vllm_C_sm90.so")
    kind = uint4b8(folder)

    def prepare(layer):
        sms = torch.cuda.get_device_properties(layer.codes.device).multi_processor_count
        return {"w": torch.ops._C.gptq_marlin_repack(gptq_words(layer), layer.k, layer.n, 4, False),
                "scales": marlin_scales(group_scales(layer)), "n": layer.n,
                "locks": torch.zeros(4 * sms, dtype=torch.int32, device=layer.codes.device)}

    def call(x, w):
        return torch.ops._C.marlin_gemm(x, None, w["w"], None, w["scales"], None, None, None, w["locks"], kind,
                                        x.shape[0], w["n"], x.shape[1], False, True, False)
    return [Contender("Marlin", "peer", needs(64, 128, (32, 64, 128)), prepare, call)]


def machete(folder: pathlib.Path) -> list[Contender]:
    load_ops(folder, "vllm_C_sm90.so")
    kind = uint4b8(folder)

    def prepare(layer):
        words = gptq_words(layer).t().contiguous().t()
        return {"w": torch.ops._C.machete_prepack_B(words, BF16, kind, BF16), "scales": group_scales(layer),
                "group_size": layer.group_size}

    def call(schedule, x, w):
        return torch.ops._C.machete_mm(x, w["w"], kind, None, w["scales"], None, w["group_size"], None, None, schedule)
    supports = needs(128, 64, (64, 128))
    variants = torch.ops._C.machete_supported_schedules(BF16, kind, BF16, None, None, None, None)
    return [Contender("Machete", "peer", supports, prepare, functools.partial(call, None))] + [
        Contender(f"Machete {name}", "peer", supports, prepare, functools.partial(call, name), best_of="Machete best")
        for name in variants]


def humming(folder: pathlib.Path) -> list[Contender]:
    add_wheel(folder, "humming_kernels-*.whl")
    from humming.layer import HummingLayer

    def prepare(layer):
        with torch.device(layer.codes.device):
            module = HummingLayer(layer.n, layer.k, weight_config={"quant_method": "gptq", "bits": 4, "sym": True,
                                                                   "group_size": layer.group_size}, torch_dtype=BF16)
        zeros = torch.full((layer.k // layer.group_size, layer.n // 8), 0x77777777, dtype=torch.int32)
        module.load_from_tensors({"qweight": gptq_words(layer), "scales": group_scales(layer), "qzeros": zeros,
                                  "g_idx": torch.arange(layer.k, dtype=torch.int32) // layer.group_size})
        module.transform()
        return module
    return [Contender("humming", "peer", needs(64, 128, (32, 64, 128)), prepare, lambda x, module: module(x))]


def fbgemm(folder: pathlib.Path) -> list[Contender]:
    load_ops(folder, "fbgemm_genai_sm90.so")

    def prepare(layer):
        w, scales = torch.ops.fbgemm.preshuffle_i4(signed_pairs(layer.codes), group_scales(layer))
        return {"w": w, "scales": scales, "zeros": torch.zeros_like(group_scales(layer))}

    def call(x, w):
        return torch.ops.fbgemm.bf16i4bf16_shuffled(x, w["w"], w["scales"], w["zeros"])
    return [Contender("FBGEMM", "peer", needs(64, 128, (128,)), prepare, call)]


def signed_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Two's complement code - 8, neighbours in a byte, the first in the low half: int8 [n, k/2]."""
    return byte_pairs(codes ^ 8, first_high=False).view(torch.int8)


def conch(folder: pathlib.Path) -> list[Contender]:
    add_wheel(folder, "conch_triton_kernels-*.whl")
    from conch.ops.quantization.gemm import mixed_precision_gemm

    def prepare(layer):
        return {"w": gptq_words(layer), "scales": group_scales(layer), "group_size": layer.group_size}

    def call(x, w):
        return mixed_precision_gemm(x=x, w_q_packed=w["w"], w_s=w["scales"], w_zp=None, weight_size_bits=4, weight_bias=8,
                                    group_size=w["group_size"])
    return [Contender("Conch", "peer", needs(64, 128, (128,)), prepare, call)]


PEERS = {"Marlin": marlin, "Machete": machete, "humming": humming, "FBGEMM": fbgemm, "Conch": conch}


def collect(folder: pathlib.Path | None) -> tuple[list[Contender], dict[str, str]]:
    """The peers that load from `folder`, and {peer: why it is missing} of the others."""
    found, missing = [], {}
    for name, load in PEERS.items():
        if folder is None:
            missing[name] = "no --peers folder"
            continue
        try:
            found += load(folder)
        except Exception as error:  # somebody else's binary: whatever it says is the reason
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found, missing
