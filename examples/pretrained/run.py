"""Unlearn capitals from a pretrained model: every run of grid.py that has no result yet, and a small JSON file for each.

    python examples/pretrained/run.py --model SmolLM2-135M-Instruct --part 1/2    # and --part 2/2 in another terminal

A run that has its file in ``results`` is not made again, so this can be stopped and called again at any time. Then report.py
writes docs/pretrained.md.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import time

import torch
from grid import options, runs

import soul
from soul.data.sources import examples, rows
from soul.data.templates import Template
from soul.evaluate.metrics import rouge_recall
from soul.evaluate.model import EvaluateConfig, answer_columns, answer_probabilities, generate
from soul.models import load
from soul.models.encoding import encode_for

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
SETS = ("forget", "retain", "heldout")
SHOWN = 3  # answers of each set, of rows that begin equal parts of the file
GENERAL = ("What is the capital of France?", "How many days are there in a week?", "Write one sentence about the sea.")


def main():
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory or hub name of SmolLM2-135M-Instruct")
    parser.add_argument(
        "--data", default=HERE / "capitals", type=pathlib.Path, help="folder with forget, retain, heldout .jsonl"
    )
    parser.add_argument("--results", default=RESULTS, type=pathlib.Path, help="(default: %(default)s)")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th run, from the I-th")
    parser.add_argument("--most", type=int, help="make at most so many runs")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    args.results.mkdir(parents=True, exist_ok=True)
    before = args.results / "before.json"
    if part == 1 and not before.exists():
        write(before, measured(*load(args.model), args.data))
    missing = [run for run in runs()[part - 1 :: parts] if not (args.results / f"{run[0]}.json").exists()]
    for number, (name, *point) in enumerate(missing[: args.most], 1):
        print(f"{number} of {len(missing)}: {name}", flush=True)
        write(args.results / f"{name}.json", unlearned(args.model, args.data, *point))


def unlearned(model, data, arm, seed, alpha, choice):
    """Make one run; return its result."""
    config = soul.UnlearnConfig(**options(arm, seed, alpha, choice))
    files = (data / "forget.jsonl", data / "retain.jsonl")
    begun, processor = time.perf_counter(), time.process_time()
    unlearner = soul.Unlearner(model, *files, config, dtype="float32")
    point = {"arm": arm, "seed": seed, "alpha": alpha, "choice": choice}
    try:
        records = unlearner.run(progress=False)
    except FloatingPointError as error:
        return {**point, "diverged": str(error)}
    times = {"seconds": time.perf_counter() - begun, "processor_seconds": time.process_time() - processor}
    clipped = [record["clip_fraction"] for record in records if "clip_fraction" in record]
    more = {"steps": len(records), "clipped": sum(clipped) / len(clipped) if clipped else None}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, of all runs of this process so far
    return {**point, **more, **times, "peak_gib": peak, **measured(unlearner.model, unlearner.tokenizer, data)}


def measured(model, tokenizer, data):
    """Return probability, ROUGE-L recall and extraction strength of each set, some answers, and where this was measured."""
    asking = EvaluateConfig(template="chat", max_new_tokens=24)
    template = Template("chat", tokenizer)
    numbers = {}
    said = []
    for name in SETS:
        of_set = examples(rows(data / f"{name}.jsonl"), template)
        sequences = encode_for(model, tokenizer, of_set, asking, name)
        texts = generate(model, tokenizer, sequences, max_new_tokens=24)
        numbers[f"{name}_prob"] = answer_probabilities(model, sequences).mean().item()
        numbers[f"{name}_rouge"] = rouge_recall([e.content for e in of_set], texts)["rougeL_recall"].mean().item()
        strengths = answer_columns(model, tokenizer, sequences, asking)["extraction_strength"]
        numbers[f"{name}_extraction_strength"] = sum(strengths) / len(strengths)
        questions = [json.loads(line)["question"] for line in (data / f"{name}.jsonl").read_text().splitlines()]
        chosen = [index * len(questions) // SHOWN for index in range(SHOWN)]
        said += [[name, questions[index], texts[index]] for index in chosen]
    general = encode_for(model, tokenizer, [template.ask(question, "x") for question in GENERAL], asking, "general")
    said += [["general", *pair] for pair in zip(GENERAL, generate(model, tokenizer, general, max_new_tokens=24))]
    machine = {"machine": cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__, "soul": soul.__version__}
    return {**numbers, "said": said, **machine}


def cpu():
    """Return the name of the processor."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def write(path, result):
    """Write a result as JSON, whole or not at all."""
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.rename(path)


if __name__ == "__main__":
    main()
