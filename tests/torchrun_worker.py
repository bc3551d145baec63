"""What torchrun starts for tests/test_torchrun.py: several runs in one set of processes, which take seconds to start."""

import json
import pathlib
import sys

import torch

import soul
from soul import distributed
from soul.distributed import Processes, whole_state
from tests.models import examples, tiny_model, tiny_tokenizer


def run(family, options, output=None, **how):
    """One run of 2 epochs over 5 examples; the log, and the whole weights in the first process."""
    dtype = getattr(torch, how.pop("dtype", "float32"))
    config = soul.UnlearnConfig(**{"lr": 1e-3, "epochs": 2, "batch_size": 3, "backend": "reference", **options})
    rows = examples(12)
    unlearner = soul.Unlearner(tiny_model(family).to(dtype), rows[:5], rows[5:], config, tokenizer=tiny_tokenizer())
    records = unlearner.run(output, progress=False, **how)
    if Processes.of(unlearner.model).size == 1:
        return records, {name: tensor.clone() for name, tensor in unlearner.model.state_dict().items()}
    return records, whole_state(unlearner.model)


def main(folder):
    folder = pathlib.Path(folder)
    with distributed.started(torch.device("cpu")):
        for number, (family, options, how) in enumerate(json.loads((folder / "cases.json").read_text())):
            try:
                result = run(family, options, **how)
            except soul_errors() as error:
                result = str(error)
            if torch.distributed.get_rank() == 0:
                torch.save(result, folder / f"{number}.pt")


def soul_errors():
    from soul.checkpoint import Stopped

    return ValueError, OSError, Stopped


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
