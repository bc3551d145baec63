"""Checkpoints: whatever stops a run, it goes on from the last one bit for bit.

`local` has those of one process, `sharded` those of several, `format` what both write beside the tensors. May import: models,
distributed, output, and below. Start with `local`.
"""
