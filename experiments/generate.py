"""Writes text with a trained model.

    tools/bazel run //experiments:generate -- --checkpoint=runs/quickstart/<time> --prompt="ROMEO:"
    tools/bazel run //experiments:generate -- --checkpoint=<folder of Hugging Face's GPT-2> \
        --prompt="First" --prompt="Second" --temperature=0

Continues each prompt and prints it with its text; the last line is JSON with the same.
"""

from flashtrain import environment

if __name__ == "__main__":
    environment.start("interrupted")  # before the other imports, which take long

import json
import sys

from absl import flags

from experiments import command_line
from flashtrain.data.paths import user_path
from flashtrain.errors import UserError
from flashtrain.train import launcher


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()

    def define(function, name, default, text, **options):
        function(name, default, text, flag_values=values, **options)

    define(flags.DEFINE_string, "checkpoint", None, "a run, a checkpoint, or Hugging Face's GPT-2")
    define(flags.DEFINE_multi_string, "prompt", ["\n"], "text to continue; may be given repeatedly")
    define(flags.DEFINE_integer, "max_new_tokens", 200, "how many tokens to add")
    define(flags.DEFINE_float, "temperature", 0.8, "divides the logits; 0: the likeliest token")
    define(flags.DEFINE_integer, "top_k", 0, "sample among the k likeliest tokens; 0: among all")
    define(flags.DEFINE_float, "top_p", 1.0, "sample among the likeliest tokens that make up this")
    define(flags.DEFINE_integer, "seed", 0, "of the samples")
    define(flags.DEFINE_bool, "ema", False, "use the moving average of the weights")
    define(flags.DEFINE_string, "device", "auto", "auto (a GPU if there is one), cpu or cuda")
    define(flags.DEFINE_bool, "help", False, "show this and exit")
    return values


def main() -> int:
    """Parses, loads, writes."""
    values = _define_flags()
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        lines = [f"  {flag:<26} {text}" for flag, text in command_line.flag_lines(values)]
        print("\n".join(["usage: generate [flags]", "", *lines]))
        return 0
    command_line.parse_flags(sys.argv, values)
    if not values.checkpoint:
        raise UserError("--checkpoint=<folder> names the model; --help shows the flags")
    for name, low, high in (("max_new_tokens", 0, 2**63), ("top_k", 0, 2**63), ("seed", 0, 2**64)):
        if not low <= values[name].value < high:
            raise UserError(f"--{name}={values[name].value} must be in {low}..{high - 1}")
    # Bytes of a prompt that are not UTF-8 come as surrogates, which are no text.
    given = [
        text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for text in values.prompt
    ]

    import torch  # here: it takes seconds, and --help needs none

    from flashtrain.train.load_model import load_model

    if values.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device={values.device} is not known; valid: auto, cpu, cuda")
    has_gpu = torch.cuda.is_available()
    if values.device == "cuda" and not has_gpu:
        raise UserError("--device=cuda, but torch finds no GPU; use --device=cpu")
    device = torch.device("cuda" if has_gpu and values.device != "cpu" else "cpu")
    loaded = load_model(user_path(values.checkpoint), device, ema=values.ema)
    prompts = [
        torch.tensor(loaded.tokenizer.encode(text), dtype=torch.int64, device=device)
        for text in given
    ]
    try:
        tokens = loaded.model.generate(
            prompts,
            values.max_new_tokens,
            temperature=values.temperature,
            top_k=values.top_k or None,
            top_p=values.top_p,
            generator=torch.Generator(device).manual_seed(values.seed),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    longest = max(map(len, prompts))
    # A model may have more tokens than its data; those have no text.
    texts = [
        loaded.tokenizer.decode(
            t for t in row[longest - len(prompt) :].tolist() if t < loaded.tokenizer.vocab_size
        )
        for row, prompt in zip(tokens, prompts, strict=True)
    ]
    for text in texts:
        print(f"{text}\n{'-' * 20}")
    samples = [{"prompt": prompt, "text": text} for prompt, text in zip(given, texts, strict=True)]
    print(json.dumps({"checkpoint": values.checkpoint, "samples": samples}))
    return 0


if __name__ == "__main__":
    sys.exit(launcher.run_main(main))
