"""The parts that the other scripts of this folder share: options, model, data, and the comparison with the plain way."""

import argparse
import itertools
import json
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import soul
from soul.integrations.hf import collate_unlearning


def options(description, output, steps=20):
    """Return a parser of the options that the scripts have in common; without ``--steps`` if steps is None."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="out/demo/seed0/full", help="directory or hub name (default: of `soul demo`)")
    parser.add_argument("--forget", default="out/demo/forget.jsonl", help="JSON lines with question and answer")
    parser.add_argument("--retain", default="out/demo/retain.jsonl", help="the same")
    parser.add_argument("--output", default=output, help="where to save the result (default: %(default)s)")
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help="(default: %(default)s)")
    return parser


def load(args):
    """Return a model in training mode, on the GPU if there is one; its tokenizer; the rows to forget; and those to retain."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return model, tokenizer, *(list(rows_of(path, tokenizer)) for path in (args.forget, args.retain))


def rows_of(path, tokenizer):
    """Yield ids and labels of every row. The question has no label (-100): only the answer is forgotten or kept."""
    for row in map(json.loads, open(path, encoding="utf-8")):
        question = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        answer = tokenizer(f" {row['answer']}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        yield {"input_ids": question + answer, "labels": [-100] * len(question) + answer}


def collate(rows, device):
    """Return rows as inputs of a model, padded on the right: input_ids, attention_mask and labels, [B, T]."""
    return {name: tensor.to(device) for name, tensor in collate_unlearning(list(rows)).items()}


def collate_pairs(items):
    """Return pairs of a row to forget and a row to retain as inputs of a patched model: the forget rows, then the others."""
    rows = [forget for forget, _ in items] + [retain for _, retain in items]
    return {**collate_unlearning(rows), "is_forget": torch.arange(len(rows)) < len(items)}


def peak(call):
    """Run a call; return the most bytes that it held at a time beyond those held before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)


def seconds(call):
    """Run a call; return its time."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(what, ours, plain, before=lambda: None):
    """Print time (the median of three calls, which take turns) and memory of two calls that do the same."""
    held, *times = [[(before(), measure(way))[1] for way in (ours, plain)] for measure in (peak, seconds, seconds, seconds)]
    (a, b), (c, d) = map(statistics.median, zip(*times)), held
    print(f"{what}: {1e3 * a:.1f} ms and {c / 2**20:.2f} MiB, the plain way {1e3 * b:.1f} ms and {d / 2**20:.2f} MiB "
          f"({a / b:.2f} x the time, {c / d:.2f} x the memory)", flush=True)  # fmt: skip


def compare_patched(model, objective, pairs):
    """Compare the loss of a patched model, for a `soul.losses.GradDiff`, with that by the logits of all tokens."""
    both = {name: tensor.to(model.device) for name, tensor in collate_pairs(pairs).items()}
    forget, retain = (collate(rows, model.device) for rows in zip(*pairs))

    def plain():  # by the forward before the patch
        retain_loss, forget_loss = (model.forward.plain(**side).loss for side in (retain, forget))
        (objective.alpha * retain_loss - objective.gamma * forget_loss).backward()

    with soul.fused(model, objective):
        compare("loss and gradients", lambda: model(**both).loss.backward(), plain, model.zero_grad)
