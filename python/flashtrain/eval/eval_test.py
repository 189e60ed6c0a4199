"""Benchmarks against answers worked out by hand or token by token, on files as published."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashtrain.data.tokenizer import ByteTokenizer
from flashtrain.distributed import World
from flashtrain.errors import UserError
from flashtrain.eval import Scorer, parse_benchmarks, run_benchmarks
from flashtrain.eval.benchmarks import BENCHMARKS, _detokenized, _without_markup
from flashtrain.eval.scoring import Request

VOCAB = 256
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class BagModel:
    """A causal model whose logits depend on all tokens before, so that padding would show."""

    def __init__(self, seed: int = 0):
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        return self.table[tokens_BT].cumsum(dim=1)


def scorer(model, *, max_seq_len: int = 64, batch_size: int = 3, world: World = ALONE) -> Scorer:
    return Scorer(model, ByteTokenizer(), max_seq_len, batch_size, world)


def one_by_one(model, request: Request, max_seq_len: int) -> tuple[float, bool]:
    """The score, each token on its own."""
    total, greedy = 0.0, True
    tokens = list(request.context)
    skipped = len(request.context) + len(request.continuation) - (max_seq_len + 1)
    start = max(0, skipped)  # the oldest tokens, left out of every position's window
    kept = [*request.context, *request.continuation][start:]
    first = max(len(tokens) - start, 1)
    for position in range(first, len(kept)):
        logits = model(torch.tensor([kept[:position]]))[0, -1].double()
        total += logits.log_softmax(-1)[kept[position]].item()
        greedy &= logits.argmax().item() == kept[position]
    return total, greedy


def requests(generator: torch.Generator) -> list[Request]:
    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB, (count,), generator=generator).tolist())

    return [
        Request(draw(c), draw(n)) for c, n in ((1, 1), (9, 3), (2, 30), (40, 7), (5, 1), (3, 2))
    ]


@pytest.mark.parametrize("max_seq_len", [64, 16, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_equal_those_token_by_token(max_seq_len: int, batch_size: int) -> None:
    model, asked = BagModel(), requests(torch.Generator().manual_seed(1))
    scores = scorer(model, max_seq_len=max_seq_len, batch_size=batch_size).score(asked)
    expected = torch.tensor([one_by_one(model, r, max_seq_len) for r in asked]).double()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


def test_greedy_continuations_are_seen() -> None:
    model = BagModel()
    tokens = [7]
    for _ in range(5):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    right = Request((7,), tuple(tokens[1:]))
    wrong = Request((7,), (*tokens[1:-1], (tokens[-1] + 1) % VOCAB))
    assert scorer(model).score([right, wrong])[:, 1].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_shares_of_ranks_add_up(size: int) -> None:
    model, asked = BagModel(), requests(torch.Generator().manual_seed(2))
    calls = []

    @dataclasses.dataclass(frozen=True)
    class Rank(World):
        def sum(self, tensor: Tensor) -> Tensor:
            return tensor

    total = torch.zeros(len(asked), 2, dtype=torch.float64)
    for rank in range(size):
        count = 0

        def counted(tokens_BT: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return model(tokens_BT)

        world = Rank(rank, size, rank, size, torch.device("cpu"))
        total += scorer(counted, batch_size=1, world=world).score(asked)
        calls.append(count)
    assert len(set(calls)) == 1  # models that are split among ranks wait for each other
    torch.testing.assert_close(total, scorer(model).score(asked), rtol=1e-6, atol=1e-6)


def write_lines(path: Path, examples: list) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path


def likes(text: str):
    """A model that gives the tokens of `text` a logit of 10 and others 0, wherever they stand."""
    logits = torch.zeros(VOCAB)
    logits[list(set(text.encode()))] = 10.0
    return lambda tokens_BT: logits.expand(*tokens_BT.shape, VOCAB)


HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "label": 3,
    "endings": ["xyxyxyxy", "bbbb", "cccccc", "aaaa aaaa"],
}


def test_hellaswag(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "hellaswag_val.jsonl", [HELLASWAG, HELLASWAG | {"label": 1}])
    # The model likes "a" and the space: the last ending is the likeliest, of four bytes as of nine.
    assert BENCHMARKS["hellaswag"](file, scorer(likes("a "), max_seq_len=128)) == {
        "accuracy": 0.5,
        "accuracy_norm": 0.5,
    }
    # One that likes nothing: the shortest ending is the likeliest, per byte too, as all bytes cost
    # the same but the space before the ending counts.
    uniform = BENCHMARKS["hellaswag"](file, scorer(likes(""), max_seq_len=128))
    assert uniform == {"accuracy": 0.5, "accuracy_norm": 0.5}
    unlabelled = write_lines(tmp_path / "test.jsonl", [HELLASWAG | {"label": ""}])
    with pytest.raises(UserError, match=r"test.jsonl, line 1: label must be 0 to 3, got ''"):
        BENCHMARKS["hellaswag"](unlabelled, scorer(likes("")))


def test_hellaswag_texts_are_cleaned() -> None:
    assert (
        _without_markup(" Use soap. [title] Rinse. [step] Dry  it. ") == "Use soap.. Rinse. Dry it."
    )


def test_lambada(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "lambada_test.jsonl", [{"text": "he saw a aaa"}, {"text": "b bbb"}]
    )
    model = likes("a")  # greedy decoding writes "a" for ever, and never the space before the word
    results = BENCHMARKS["lambada"](file, scorer(model))
    normaliser = math.log(math.exp(10) + VOCAB - 1)
    nats = [4 * normaliser - 30, 4 * normaliser]
    assert results["accuracy"] == 0.0
    assert results["perplexity"] == pytest.approx(math.exp(sum(nats) / 2), rel=1e-5)
    one_word = write_lines(tmp_path / "one.jsonl", [{"text": "word"}])
    with pytest.raises(UserError, match="one word only"):
        BENCHMARKS["lambada"](one_word, scorer(model))


WIKITEXT = (
    " \n = Robert Boulter = \n \n Robert Boulter is an English film , television and theatre"
    " actor . \n"
)


@pytest.mark.parametrize("max_seq_len", [1, 7, 500])
def test_wikitext_of_a_uniform_model(max_seq_len: int, tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_text(WIKITEXT, encoding="utf-8")
    results = BENCHMARKS["wikitext"](file, scorer(likes(""), max_seq_len=max_seq_len))
    tokens = len(_detokenized(WIKITEXT).encode())
    assert results["perplexity"] == pytest.approx(VOCAB, rel=1e-6)
    words = len(WIKITEXT.split())
    assert results["word_perplexity"] == pytest.approx(VOCAB ** (tokens / words), rel=1e-6)
    assert results["bits_per_byte"] == pytest.approx(8 * tokens / len(WIKITEXT), rel=1e-6)


def test_wikitext_windows_see_what_is_before(tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_text("abcdefgh", encoding="utf-8")
    model = BagModel()
    results = BENCHMARKS["wikitext"](file, scorer(model, max_seq_len=4))
    first, second = Request((10,), tuple(b"abcd")), Request((ord("d"),), tuple(b"efgh"))
    nats = -sum(one_by_one(model, r, 4)[0] for r in (first, second))
    assert results["perplexity"] == pytest.approx(math.exp(nats / 8), rel=1e-4)


def test_wikitext_is_detokenized() -> None:
    text = ' a @-@ b , c . ( d ) 1 @,@ 000 @.@ 5 " e f " g \'s = = H = = \n'
    assert _detokenized(text) == ' a-b, c. (d) 1,000.5 "e f" g\'s == H ==\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no examples"),
        ("not json\n", "line 1 is not JSON"),
        ('{"text": "a b"}\n[]\n', "line 2 is no object"),
        ("\n" + "[" * 100_000 + "\n", "line 2 is nested too deep"),
        ('{"text": "a b"}\n{"text": "a', "line 2 is not JSON"),
        ('{"text": 7}\n', "line 1: text must be a text, got 7"),
        ('{"txt": "a b"}\n', r"line 1 lacks \{'text'\}; each line has the keys text"),
    ],
)
def test_other_formats_are_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "lambada.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        BENCHMARKS["lambada"](file, scorer(likes("")))


def test_benchmarks_take_marks_and_lone_surrogates(tmp_path: Path) -> None:
    file = tmp_path / "lambada.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a caf\\ud83d"}\n')
    assert BENCHMARKS["lambada"](file, scorer(likes("")))["accuracy"] == 0.0
    file.write_bytes(b'{"text": "a b"}\n{"text": "a \xff"}\n')
    with pytest.raises(UserError, match=r"line 2 is not JSON: 'utf-8' codec"):
        BENCHMARKS["lambada"](file, scorer(likes("")))


@pytest.mark.parametrize("endings", [["a", "b", "c", 4], ["a", "b", "c"], "abcd", list("ab ") * 2])
def test_hellaswag_endings_are_four_texts(endings: object, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "h.jsonl", [HELLASWAG | {"endings": endings}])
    with pytest.raises(UserError, match=r"h.jsonl, line 1: endings must be a list of four texts"):
        BENCHMARKS["hellaswag"](file, scorer(likes("")))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_file_that_has_gone_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"cannot read {tmp_path}/gone: ") as refusal:
        BENCHMARKS[name](tmp_path / "gone", scorer(likes("")))
    assert "\n" not in str(refusal.value)


def test_the_perplexity_of_a_bad_model_is_infinite(tmp_path: Path) -> None:
    logits = torch.full((VOCAB,), -1e6)
    logits[0] = 0.0

    def never(tokens_BT: Tensor) -> Tensor:
        return logits.expand(*tokens_BT.shape, VOCAB)

    lambada = write_lines(tmp_path / "lambada.jsonl", [{"text": "he saw"}])
    assert BENCHMARKS["lambada"](lambada, scorer(never))["perplexity"] == math.inf
    wikitext = tmp_path / "wiki.test.raw"
    wikitext.write_text(WIKITEXT, encoding="utf-8")
    results = BENCHMARKS["wikitext"](wikitext, scorer(never))
    assert results["perplexity"] == results["word_perplexity"] == math.inf
    assert math.isfinite(results["bits_per_byte"])


def test_undecodable_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"not UTF-8 text .* at byte 3"):
        BENCHMARKS["wikitext"](file, scorer(likes("")))


def test_results_have_the_names_of_their_benchmarks(tmp_path: Path) -> None:
    lambada = write_lines(tmp_path / "lambada_test.jsonl", [{"text": "he saw a aaa"}])
    wikitext = tmp_path / "wiki.test.raw"
    wikitext.write_text(WIKITEXT, encoding="utf-8")
    results = run_benchmarks({"lambada": lambada, "wikitext": wikitext}, scorer(likes("")))
    assert list(results) == [
        *("lambada/accuracy", "lambada/perplexity"),
        *("wikitext/perplexity", "wikitext/word_perplexity", "wikitext/bits_per_byte"),
    ]
    assert results["wikitext/perplexity"] == pytest.approx(VOCAB, rel=1e-6)


def test_parse_benchmarks(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "l.jsonl", [])
    assert parse_benchmarks("") == {}
    assert parse_benchmarks(f"lambada={file}, wikitext={file}") == {
        "lambada": file,
        "wikitext": file,
    }
    for text, message in (
        (f"lambda={file}", "did you mean.*lambada|lambada"),
        ("lambada", "no file; give lambada=<file>"),
        (f"lambada={file},lambada={file}", "given twice"),
        ("wikitext=/nowhere", "no file /nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            parse_benchmarks(text)
