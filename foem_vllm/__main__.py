"""`python -m foem_vllm`, which torchrun can start several times."""

from foem_vllm.cli import main

main()
