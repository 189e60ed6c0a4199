"""Measures a trained model: validation loss and perplexity, HellaSwag, LAMBADA, WikiText.

    tools/bazel run //experiments:eval -- --checkpoint=runs/gpt2s/<time>
    tools/bazel run //experiments:eval -- --checkpoint=<folder of Hugging Face's GPT-2> \
        --benchmarks=hellaswag=hellaswag_val.jsonl,lambada=lambada_test.jsonl,wikitext=wiki.test.raw

A run of ours is also measured on the whole validation split of its data. All GPUs take a share. The
last line is JSON with the results.
"""

from flashtrain import environment

if __name__ == "__main__":
    environment.start("interrupted")  # before the other imports, which take long

import json
import os
import sys
from typing import Any

from absl import flags

from experiments import command_line
from flashtrain.data.paths import user_path
from flashtrain.errors import UserError
from flashtrain.train import launcher


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()

    def define(function, name, default, text):
        function(name, default, text, flag_values=values)

    define(flags.DEFINE_string, "checkpoint", None, "a run, a checkpoint, or Hugging Face's GPT-2")
    define(flags.DEFINE_string, "benchmarks", "", "<name>=<file>,...: hellaswag, lambada, wikitext")
    define(flags.DEFINE_bool, "validate", True, "measure the validation split of a run's data")
    define(flags.DEFINE_integer, "batch_size", 16, "sequences at a time on each device")
    define(flags.DEFINE_string, "precision", "bf16", "fp32, tf32, bf16 or fp16")
    define(flags.DEFINE_bool, "ema", False, "use the moving average of the weights")
    define(flags.DEFINE_string, "device", "auto", "auto (GPUs if there are any), cpu or cuda")
    define(flags.DEFINE_integer, "devices", 0, "processes, one a device; 0: every GPU, or one")
    define(flags.DEFINE_bool, "help", False, "show this and exit")
    return values


def main() -> int:
    """Parses, loads and measures, in one process for each device."""
    values = _define_flags()
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        lines = [f"  {flag:<26} {text}" for flag, text in command_line.flag_lines(values)]
        print("\n".join(["usage: eval [flags]", "", *lines]))
        return 0
    command_line.parse_flags(sys.argv, values)
    if not values.checkpoint:
        raise UserError("--checkpoint=<folder> names the model; --help shows the flags")
    if values.batch_size < 1:
        raise UserError(f"--batch_size={values.batch_size} must be at least 1")
    for name, valid in (
        ("device", ("auto", "cpu", "cuda")),
        ("precision", ("fp32", "tf32", "bf16", "fp16")),
    ):
        if (value := values[name].value) not in valid:
            raise UserError(f"--{name}={value} is not known; valid: {', '.join(valid)}")
    processes = launcher.processes_to_start(values.device, values.devices)
    if processes > 1:
        return launcher.launch(processes, [os.path.abspath(__file__), *sys.argv[1:]])
    _measure(values)
    return 0


def _measure(values: flags.FlagValues) -> None:
    from flashtrain import distributed
    from flashtrain.eval import Scorer, exp, parse_benchmarks, run_benchmarks
    from flashtrain.train.load_model import load_model
    from flashtrain.train.precision import Precision

    files = parse_benchmarks(values.benchmarks)
    world = distributed.start(values.device)
    loaded = load_model(user_path(values.checkpoint), world.device, ema=values.ema)
    precision = Precision(values.precision, world.device)
    results: dict[str, Any] = {"checkpoint": values.checkpoint}
    if values.validate and loaded.config is not None:
        loss = _validation_loss(loaded, precision, values.batch_size, world)
        results |= {"val/loss": loss, "val/perplexity": exp(loss)}
    scorer = Scorer(
        loaded.model,
        loaded.tokenizer,
        loaded.model.config.max_seq_len,
        values.batch_size,
        world,
        precision.autocast,
    )
    results |= run_benchmarks(files, scorer)
    if world.is_main:
        for name, value in results.items():
            print(f"{name:<28}{value}")
        print(json.dumps(results))
    distributed.stop()


def _validation_loss(loaded: Any, precision: Any, batch_size: int, world: Any) -> float:
    """Mean cross entropy per token, in nats, over the whole split of the run's data."""
    import torch

    from flashtrain.data import DataError, load_dataset

    options = {key: value for key, value in loaded.config["data"].items() if key != "batch_size"}
    try:
        dataset = load_dataset(**options)
    except DataError as error:
        raise UserError(f"{error}; --novalidate leaves the validation split out") from error
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    with torch.no_grad(), precision.autocast():
        for batch in dataset.val_batches(batch_size, rank=world.rank, world_size=world.size):
            tokens, targets, *rest = (tensor.to(world.device) for tensor in batch)
            loss, count = loaded.model(tokens, targets, *rest), targets.numel()
            totals += torch.stack([loss * count, torch.full_like(loss, count)])
    loss_sum, targets_sum = world.sum(totals).tolist()
    return loss_sum / targets_sum


if __name__ == "__main__":
    sys.exit(launcher.run_main(main))
