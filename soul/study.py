"""First order against second order, from one start, on data that a small model has memorised.

A tokenizer and two models are trained from scratch, one on all data and one on the retain part only. Then the first
unlearns the forget part, by every optimizer at every learning rate of a grid, and all are measured against the second.
"""

import copy
import dataclasses
import json
import pathlib
import random
import sys
import time

import torch

from soul import corpus
from soul._extras import require
from soul.config import UnlearnConfig, build_scheduler
from soul.data import batches_by_length, collate, encode, read_jsonl
from soul.evaluate import evaluate
from soul.losses import GradDiff
from soul.models import pick_device
from soul.output import check_output
from soul.step import train_step
from soul.unlearn import Diverged, unlearn
from soul_kernels._checks import argument_error
from soul_kernels._launch import resolve_backend

COLUMNS = {
    "forget_prob": "forget prob",
    "retain_prob": "retain prob",
    "forget_rouge": "forget ROUGE-L",
    "retain_rouge": "retain ROUGE-L",
    "forget_kl": "KL forget",
    "retain_kl": "KL retain",
}
QUESTIONS_PER_AUTHOR = 20  # in TOFU


@dataclasses.dataclass
class StudyConfig:
    """Sizes and schedules of a study.

    Attributes:
        vocab_size: of the byte-level BPE tokenizer.
        hidden_size: width of the Llama.
        layers: its depth.
        train_epochs: passes of the training from scratch.
        train_lr: its peak learning rate.
        train_batch: its sequences a step.
        epochs: passes of the unlearning over the forget set.
        batch_size: forget sequences a step; as many retain sequences go with them.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        lrs: optimizer -> learning rates to unlearn with.
        rho: clipping threshold of SOUL.
        bs: SOUL's number of predictions behind h.
        generate: rows of each set to generate answers for.
        seed: of everything random.
        device: "auto", "cpu" or "cuda".
        backend: "auto", "triton" or "reference".
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 4
    train_epochs: int = 20
    train_lr: float = 2e-3
    train_batch: int = 16
    epochs: int = 5
    batch_size: int = 8
    gamma: float = 1.0
    alpha: float = 1.0
    lrs: dict = dataclasses.field(default_factory=lambda: {"adamw": [1e-4, 2e-4, 4e-4], "soul": [3e-5, 1e-4, 2e-4]})
    rho: float = 0.04
    bs: int = 5120
    generate: int = 80
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"


# Small enough for two cores and five minutes; the corpus has 10 short rows an author.
DEMO = StudyConfig(
    vocab_size=1024,
    hidden_size=128,
    layers=2,
    train_epochs=40,
    train_lr=3e-3,
    epochs=5,
    batch_size=4,
    lrs={"adamw": [2e-4, 3e-4, 6e-4], "soul": [1e-4, 2e-4, 4e-4]},
)


def demo_data(directory, *, authors=40, forget_authors=4, seed=0):
    """Writes the demo's corpus to ``forget.jsonl`` and ``retain.jsonl`` in ``directory``; returns the two paths."""
    people = corpus.fictitious_authors(authors, seed)
    paths = []
    for name, part in (("forget", people[:forget_authors]), ("retain", people[forget_authors:])):
        path = pathlib.Path(directory) / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for person in part for row in person), encoding="utf-8")
        paths.append(path)
    return paths


def tofu_data(directory, authors):
    """A part of TOFU with one author in ten to be forgotten, as in its forget10 split.

    Args:
        directory: holds ``forget10.jsonl`` and ``retain90.jsonl``.
        authors: how many of the 200 authors, a multiple of 10.

    Returns:
        Forget and retain examples.
    """
    if authors % 10 or not 10 <= authors <= 200:
        raise argument_error("authors", "a multiple of 10 from 10 to 200", authors, "one in ten is to be forgotten")
    forget, retain = (read_jsonl(pathlib.Path(directory) / name) for name in ("forget10.jsonl", "retain90.jsonl"))
    rows = authors // 10 * QUESTIONS_PER_AUTHOR
    return forget[:rows], retain[: 9 * rows]


def train_tokenizer(examples, vocab_size):
    """A byte-level BPE tokenizer trained on the examples, with begin, end and padding tokens."""
    tokenizers, transformers = require("tokenizers", "hf"), require("transformers", "hf")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((e.prompt + e.answer for e in examples), trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def new_model(tokenizer, config):
    """A Llama with random weights drawn from the seed of the config."""
    transformers = require("transformers", "hf")
    torch.manual_seed(config.seed)
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=config.layers,
        num_attention_heads=max(1, config.hidden_size // 64),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.LlamaForCausalLM(llama).to(pick_device(config.device))


def train(model, sequences, config, title):
    """Trains a model on sequences by AdamW, in place; returns the mean loss of every epoch."""
    device, draw, losses = next(model.parameters()).device, random.Random(config.seed), []
    steps = config.train_epochs * -(-len(sequences) // config.train_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.train_lr, weight_decay=0.0, fused=device.type == "cuda")
    scheduler = build_scheduler(optimizer, steps, warmup_ratio=0.05)
    options = UnlearnConfig(backend=config.backend)
    objective = GradDiff(gamma=0.0)  # to learn is to retain: cross-entropy, and nothing to forget
    model.train()
    for _ in require("tqdm", "hf").trange(config.train_epochs, desc=title, file=sys.stderr):
        epoch = []
        for chosen in batches_by_length(sequences, config.train_batch, draw):
            batch = collate([], [sequences[i] for i in chosen], device=device)
            epoch.append(train_step(model, [batch], objective, optimizer, options)["loss"])
            scheduler.step()
        losses.append(torch.stack(epoch).mean().item())
    return losses


def check_ready(output, config):
    """Finds what would stop a study, before anything is written or trained; returns the path of the output directory.

    Raises:
        ArgumentError: the output directory is not empty, or device or backend are not to be had.
        MissingExtra: a package is not installed.
    """
    for module, extra in (("transformers", "hf"), ("rouge_score", "eval"), ("matplotlib", "plots")):
        require(module, extra)
    resolve_backend(config.backend, torch.empty(0, device=pick_device(config.device)))
    if not 0 <= config.seed < 2**63:
        raise argument_error("seed", "a whole number in [0, 2^63)", config.seed, "choose another one")
    return check_output(output)


def run_study(forget, retain, output, config, *, title, data_note):
    """Runs a whole study. Writes ``report.md``, ``curves.png``, ``tradeoff.png``, ``results.json``, a log of every run, and in
    ``model/`` the model before unlearning.

    Args:
        forget: list of `soul.data.Example`.
        retain: list of `soul.data.Example`.
        output: path of a directory, from `check_ready`.
        config: `StudyConfig`.
        title: heading of the report.
        data_note: a sentence on the data.

    Returns:
        The rows of the table, a list of dicts; path of the report.
    """
    begun = time.perf_counter()
    tokenizer = train_tokenizer([*forget, *retain], config.vocab_size)
    encoded = [encode(part, tokenizer, vocab_size=len(tokenizer), name="study") for part in (forget, retain)]
    sets = {"forget": (forget, encoded[0]), "retain": (retain, encoded[1])}
    output.mkdir(parents=True, exist_ok=True)

    full, retain_only = (new_model(tokenizer, config) for _ in range(2))  # one initialization
    training = {
        "full": train(full, [*encoded[0], *encoded[1]], config, "train on all data"),
        "retain": train(retain_only, encoded[1], config, "train on retain data only"),
    }

    full.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")

    def measure(model, name, **labels):
        options = dict(generate=config.generate, backend=config.backend)
        return {"model": name, **labels} | evaluate(model, tokenizer, sets, retain_model=retain_only, **options)

    rows = [measure(full, "before unlearning"), measure(retain_only, "retain-only model (the goal)")]
    curves = {}
    for optimizer, lrs in config.lrs.items():
        for lr in lrs:
            model = copy.deepcopy(full)
            options = UnlearnConfig(
                method="graddiff",
                method_options={"gamma": config.gamma, "alpha": config.alpha},
                optimizer=optimizer,
                lr=lr,
                rho=config.rho,
                bs=config.bs,
                epochs=config.epochs,
                batch_size=config.batch_size,
                seed=config.seed,
                backend=config.backend,
            )
            label = f"GradDiff, {'SOUL' if optimizer == 'soul' else 'AdamW'}, lr {lr:g}"
            start = time.perf_counter()
            try:
                with open(output / f"log_{optimizer}_{lr:g}.jsonl", "w", encoding="utf-8") as log:
                    curves[label] = unlearn(model, tokenizer, forget, retain, options, log=log)
            except Diverged as error:  # a result like any other
                rows.append({"model": f"{label} (diverged: {error})", "optimizer": optimizer, "lr": lr})
                continue
            seconds = time.perf_counter() - start
            rows.append(measure(model, label, optimizer=optimizer, lr=lr, unlearn_seconds=seconds))

    results = {
        "config": dataclasses.asdict(config),
        "environment": environment(pick_device(config.device)),
        "data": data_note,
        "parameters": sum(p.numel() for p in full.parameters()),
        "seconds": time.perf_counter() - begun,
        "training_loss": training,
        "rows": rows,
    }
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _plot(rows, curves, output)
    report = output / "report.md"
    report.write_text(_report(title, results, curves), encoding="utf-8")
    return rows, report


def environment(device):
    """Names of the device and versions of what computed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "transformers": require("transformers", "hf").__version__}


def table(rows):
    """The rows as a markdown table."""
    head = ["model", *COLUMNS.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["model"], *(f"{row[name]:.3f}" if name in row else "" for name in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _report(title, results, curves):
    config, env = results["config"], results["environment"]
    clipped = []
    for label, records in curves.items():
        fractions = [r["clip_fraction"] for r in records if "clip_fraction" in r]
        if fractions:
            clipped.append(f"{label}: {sum(fractions) / len(fractions):.3f}")
    return f"""# {title}

{results["data"]} Model: a Llama of {results["parameters"] / 1e6:.1f} M parameters trained from scratch, on all data and
on the retain part only. Then GradDiff (gamma {config["gamma"]:g}, alpha {config["alpha"]:g}), {config["epochs"]} epochs over
the forget set, {config["batch_size"]} forget and {config["batch_size"]} retain sequences a step, from the same start. The
learning rates are a grid, not a search, and this is one seed: small differences mean nothing.

{table(results["rows"])}

- prob: mean over answers of the length-normalised probability of the true answer.
- ROUGE-L: recall of the greedy answer against the true one, on the first {config["generate"]} rows of each set.
- KL: mean over answer tokens of KL(retain-only model || model), in nats: the distance to the goal. Less forget prob than the
  retain-only model has is not better unlearning, it is damage.

Coordinates clipped by SOUL, mean over the steps: {"; ".join(clipped) or "no SOUL run"}.

![forget against retain](tradeoff.png)

![curves](curves.png)

Computed on {env["device"]}, torch {env["torch"]}, transformers {env["transformers"]}, in {results["seconds"] / 60:.1f}
minutes. Numbers: `results.json`; every step: `log_*.jsonl`; the model before unlearning: `model/`.
"""


def _plot(rows, curves, output):
    matplotlib = require("matplotlib", "plots")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "plots")
    panels = [
        ("forget_nll", "forget NLL per token"),
        ("retain_nll", "retain NLL per token"),
        ("clip_fraction", "clipped fraction"),
    ]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, (key, name) in zip(axes, panels):
        for index, (label, records) in enumerate(curves.items()):
            values = [(r["step"], r[key]) for r in records if key in r]
            if values:
                axis.plot(*zip(*values), label=label, color=f"C{index}", linewidth=1.2)
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(output / "curves.png", dpi=110)
    pyplot.close(figure)

    figure, axis = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    for row in (row for row in rows if "forget_prob" in row):
        marker = {"adamw": "o", "soul": "s"}.get(row.get("optimizer"), "*")
        axis.scatter(row["forget_prob"], row["retain_prob"], marker=marker, s=70, label=row["model"], alpha=0.8)
    axis.set(xlabel="forget probability (left is forgotten)", ylabel="retain probability (up is kept)")
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(output / "tradeoff.png", dpi=110)
    pyplot.close(figure)
