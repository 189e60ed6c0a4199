"""HellaSwag, LAMBADA and WikiText, read from the files their authors published.

| name      | file                              | results                                    |
|-----------|-----------------------------------|--------------------------------------------|
| hellaswag | hellaswag_val.jsonl               | accuracy, accuracy_norm                    |
| lambada   | lambada_test.jsonl                | accuracy, perplexity                       |
| wikitext  | wiki.test.raw or wiki.valid.raw   | perplexity, word_perplexity, bits_per_byte |

The ways of asking are those of EleutherAI's lm-evaluation-harness, so that results compare with
published ones: HellaSwag (Zellers et al. 2019) takes the likeliest of four endings, or the one with
the highest log-likelihood per byte (accuracy_norm); LAMBADA (Paperno et al. 2016) asks for the last
word of a text, right if greedy decoding gives all its tokens; WikiText (Merity et al. 2016) is read
in windows of the model's length that do not overlap.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from flashtrain.errors import UserError, did_you_mean
from flashtrain.errors.ranges import shown
from flashtrain.eval.scoring import Request, Scorer
from flashtrain.files import cause


def parse_benchmarks(text: str) -> dict[str, Path]:
    """Reads "hellaswag=<file>,lambada=<file>".

    Raises:
        UserError: a benchmark is not known, named twice or has no readable file.
    """
    found: dict[str, Path] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, file = part.partition("=")
        if name not in BENCHMARKS:
            raise UserError(f"there is no benchmark {name!r}; {did_you_mean(name, BENCHMARKS)}")
        if not equals or not file:
            raise UserError(f"benchmark {name} has no file; give {name}=<file>")
        if name in found:
            raise UserError(f"benchmark {name} is given twice")
        found[name] = Path(file)
        if not found[name].is_file():
            raise UserError(f"benchmark {name}: there is no file {file}")
    return found


def run_benchmarks(files: Mapping[str, Path], scorer: Scorer) -> dict[str, float]:
    """Results by <benchmark>/<name>, as in "hellaswag/accuracy", the same on every rank.

    Raises:
        UserError: a file is not in its benchmark's format; says which line and why.
    """
    results: dict[str, float] = {}
    for name, file in files.items():
        results |= {f"{name}/{key}": value for key, value in BENCHMARKS[name](file, scorer).items()}
    return results


def hellaswag(file: Path, scorer: Scorer) -> dict[str, float]:
    """Which of four endings follows: accuracy by log-likelihood, and by that per byte."""
    requests, labels, num_bytes = [], [], []
    for where, example in _json_lines(
        file, texts=("ctx_a", "ctx_b", "activity_label"), others=("endings",)
    ):
        endings, label = example["endings"], example.get("label", "")
        if not (
            isinstance(endings, list)
            and len(endings) == 4
            and all(isinstance(ending, str) and _without_markup(ending) for ending in endings)
        ):
            raise UserError(f"{where}: endings must be a list of four texts")
        if str(label) not in ("0", "1", "2", "3"):
            raise UserError(f"{where}: label must be 0 to 3, got {shown(label)}: use the val split")
        context = f"{example['ctx_a']} {example['ctx_b'].capitalize()}"
        question = _without_markup(f"{example['activity_label']}: {context}")
        labels.append(int(label))
        for ending in map(_without_markup, endings):
            requests.append(_request(scorer, question, " " + ending))
            num_bytes.append(len(ending.encode("utf-8", "surrogatepass")))
    scores = scorer.score(requests)[:, 0].view(-1, 4)
    per_byte = scores / torch.tensor(num_bytes, dtype=torch.float64).view(-1, 4)
    right = torch.tensor(labels)
    return {
        "accuracy": (scores.argmax(-1) == right).double().mean().item(),
        "accuracy_norm": (per_byte.argmax(-1) == right).double().mean().item(),
    }


def lambada(file: Path, scorer: Scorer) -> dict[str, float]:
    """The last word of each text: accuracy of greedy decoding, perplexity of the word."""
    requests = []
    for where, example in _json_lines(file, texts=("text",)):
        context, space, word = example["text"].strip().rpartition(" ")
        if not space:
            raise UserError(f"{where}: the text has one word only, so there is nothing to ask")
        requests.append(_request(scorer, context, " " + word))
    scores = scorer.score(requests)
    return {
        "accuracy": scores[:, 1].mean().item(),
        "perplexity": exp(-scores[:, 0].mean().item()),
    }


def wikitext(file: Path, scorer: Scorer) -> dict[str, float]:
    """Perplexity per token and per word, and bits per byte, of the whole file."""
    try:
        published = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {cause(error)}") from error
    words, num_bytes = len(published.split()), len(published.encode("utf-8"))
    if not words:
        raise UserError(f"{file} has no text")
    tokens = scorer.tokenizer.encode(_detokenized(published))
    requests, previous = [], scorer.first_token()
    for first in range(0, len(tokens), scorer.max_seq_len):
        window = tokens[first : first + scorer.max_seq_len]
        requests.append(Request((previous,), tuple(window)))
        previous = window[-1]
    nats = -scorer.score(requests)[:, 0].sum().item()
    return {
        "perplexity": exp(nats / len(tokens)),
        "word_perplexity": exp(nats / words),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }


BENCHMARKS: dict[str, Callable[[Path, Scorer], dict[str, float]]] = {
    "hellaswag": hellaswag,
    "lambada": lambada,
    "wikitext": wikitext,
}


def exp(nats: float) -> float:
    """e to the power of `nats`, infinite beyond the largest float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _request(scorer: Scorer, context: str, continuation: str) -> Request:
    """Tokens as the whole text has them, split where the continuation begins.

    The continuation starts with a space, which no token of GPT-2's spans from the left.
    """
    encode = scorer.tokenizer.encode
    before = encode(context) or [scorer.first_token()]
    return Request(tuple(before), tuple(encode(continuation)))


def _json_lines(
    file: Path, texts: tuple[str, ...], others: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("<file>, line n", object) for each line that is not empty; it has the keys of both."""
    count, keys = 0, (*texts, *others)
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        try:
            example = json.loads(line)
        except RecursionError as error:
            raise UserError(f"{where} is nested too deep") from error
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        if not isinstance(example, dict) or (missing := set(keys) - example.keys()):
            lacks = "is no object" if not isinstance(example, dict) else f"lacks {missing}"
            raise UserError(f"{where} {lacks}; each line has the keys {', '.join(keys)}")
        for key in texts:
            if not isinstance(example[key], str):
                raise UserError(f"{where}: {key} must be a text, got {shown(example[key])}")
        count += 1
        yield where, example
    if not count:
        raise UserError(f"{file} has no examples")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The numbers and bytes of the lines that are not empty."""
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"cannot read {file}: {cause(error)}") from error


def _without_markup(text: str) -> str:
    """WikiHow's markup out of a HellaSwag text."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _detokenized(text: str) -> str:
    """WikiText as it was before its authors split words from punctuation."""
    for mark in ("@-@", "@,@", "@.@"):
        text = text.replace(f" {mark} ", mark[1])
    text = re.sub(r" ([,.;:!?%])(?=\s|$)", r"\1", text)
    text = re.sub(r"\(\s([^()]*?)\s\)", r"(\1)", text)
    text = re.sub(r"\[\s([^\[\]]*?)\s\]", r"[\1]", text)
    text = re.sub(r'"\s([^"\n]*?)\s"', r'"\1"', text)
    text = re.sub(r"(?<=\w) 's\b", "'s", text).replace("s '", "s'")
    for depth in ("= = = =", "= = =", "= ="):
        text = text.replace(depth, depth.replace(" ", ""))
    return text.replace(" \n", "\n").replace("\n ", "\n").replace(" N ", " 1 ")
