"""Samplers: one protocol (`base`), two engines (`vllm`, `native`)."""
