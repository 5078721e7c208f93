"""Benchmarks: figures of the log are measured again with `python -m bench.NAME`."""
