"""FOEM INT4 quantization of causal LMs into GPTQ-format checkpoints, and the vLLM plugin that serves them."""
