"""Measuring quantized checkpoints: lm-eval tasks, divergence from the original model, comparison tables."""
