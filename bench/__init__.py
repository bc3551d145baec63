"""Benchmarks: ``python -m bench [op ...]``. Inputs, byte models and baselines are in ``bench_<op>.py``, timing is not."""
