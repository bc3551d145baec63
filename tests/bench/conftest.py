"""What all tests of the benchmarks share."""

import gc

import pytest


@pytest.fixture(autouse=True)
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out full garbage collections: each takes up to a second once torch, Triton and transformers are imported.

    The harness collects before it looks at the memory of a process, several times a variant. Tensors are freed without.
    """
    monkeypatch.setattr(gc, "collect", lambda *args: 0)
