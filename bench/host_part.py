"""``python -m bench.host_part``: the cost of a LoRA step on the host, on any machine. It is not the time of a step."""

import statistics
import time
from unittest import mock

import torch

from bench._harness import cpu_model
from bench._optimizers import gradients
from bench.bench_sophia_step import lora, make_params
from soul import SOUL


def main(rounds: int = 200) -> None:
    """Time ``SOUL.step`` on LoRA's 128 tensors with the launch of the kernel left out, and print medians."""
    params = make_params(lora(), torch.device("cpu"), torch.bfloat16)
    grads = [gradients(params), [g.clone() for g in gradients(params)]]
    opt = SOUL(params)
    samples: dict[str, list[float]] = {"gradients where they were": [], "gradients at new addresses": []}
    with (
        mock.patch("soul_kernels._table.launch", new=lambda *args, **arguments: None),
        mock.patch("soul_kernels.sophia_step.resolve_backend", new=lambda *args, **options: "triton"),
    ):
        opt.step()
        for number in range(rounds):
            for name, at in zip(samples, (number % 2, (number + 1) % 2)):
                for p, g in zip(params, grads[at]):
                    p.grad = g
                begun = time.perf_counter()
                opt.step()
                samples[name].append((time.perf_counter() - begun) * 1e6)
    machine = f"{cpu_model()}, torch {torch.__version__}"
    print(f"host part of a step, launch left out, not a step time: {len(params)} tensors, {machine}")
    for name, times in samples.items():
        print(f"  {name:<28}{statistics.median(times):8.0f} us")


if __name__ == "__main__":
    main()
