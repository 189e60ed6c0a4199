"""Flags and files that are hostile to a program: for each, functions that make them in the current
folder and give the arguments to put behind those of a command that works."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from place import Place

Make = Callable[[Place], Sequence[str | bytes]]


def _config(text: str | bytes) -> Make:
    """A recipe with that text."""

    def make(place: Place) -> Sequence[str]:
        path = Path("recipe.py")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return [*place.arguments("train")[-2:], "--config=recipe.py", "--print_config"]

    return make


def _flags(*arguments: str | bytes) -> Make:
    return lambda place: arguments


def _file(name: str, content: bytes, *arguments: str) -> Make:
    def make(place: Place) -> Sequence[str]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
        return arguments

    return make


def _pipe(name: str, *arguments: str) -> Make:
    def make(place: Place) -> Sequence[str]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(name)
        return arguments

    return make


def _copy(what: str, change: Callable[[Path], Any], *arguments: str) -> Make:
    """A copy of the good tokens or run as "copy", and a change to it."""

    def make(place: Place) -> Sequence[str]:
        shutil.copytree(place.folder / what, "copy")
        change(Path("copy"))
        return arguments

    return make


def _json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Changes keys of a JSON file; ... removes one."""

    def change(folder: Path) -> None:
        path = next(folder.rglob(name))
        content = json.loads(path.read_text())
        for key, value in changes.items():
            content.pop(key, None)
            if value is not ...:
                content[key] = value
        path.write_text(json.dumps(content))

    return change


def _replace(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Puts other content in the place of a file; text: a link to it."""

    def change(folder: Path) -> None:
        path = next(folder.rglob(name))
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to(content)

    return change


DEEP = b"[" * 100_000 + b"]" * 100_000
GET = "def get_config(arg=None):\n    "
RECIPES: dict[str, str | bytes] = {
    "byte order mark": b"\xef\xbb\xbf" + f"{GET}return {{}}\r\n".encode(),
    "no utf-8": b"# \xff\n",
    "null": b"\0",
    "syntax": "def get_config(:\n",
    "import": "import no_such_module\n",
    "name": f"{GET}return x\n",
    "recursion": f"{GET}return get_config()\n",
    "exit": "raise SystemExit\n",
    "exit 7": f"{GET}raise SystemExit(7)\n",
    "assert": f"{GET}assert False, 'no\\nway'\n",
    "none": f"{GET}return None\n",
    "list": f"{GET}return []\n",
    "no function": "get_config = 3\n",
    "arguments": "def get_config(a, b):\n    return {}\n",
    "section": f"{GET}return {{'model': 3}}\n",
    "section none": f"{GET}return {{'trainer': None}}\n",
    "section number": f"{GET}return {{1: {{}}}}\n",
    "key": f"{GET}return {{'optim': {{'l r': 1}}}}\n",
    "key number": f"{GET}return {{'optim': {{1: 1}}}}\n",
    "unknown key": f"{GET}return {{'data': {{'shuffle': 1}}}}\n",
    "numpy": f"import numpy\n{GET}return {{'optim': {{'lr': numpy.float32(1)}}}}\n",
    "array": f"import numpy\n{GET}return {{'optim': {{'lr': numpy.ones(3)}}}}\n",
    "tensor": f"import torch\n{GET}return {{'optim': {{'lr': torch.ones(())}}}}\n",
    "function": f"{GET}return {{'optim': {{'lr': print}}}}\n",
    "family": f"{GET}return {{'model': {{'family': []}}}}\n",
    "huge": f"{GET}return {{'optim': {{'lr': 10**400}}}}\n",
    "huger": f"{GET}return {{'optim': {{'lr': 10**5000}}}}\n",
}
MANIFESTS: dict[str, Callable[[Path], Any]] = {
    "empty": _replace("manifest.json", b""),
    "deep": _replace("manifest.json", DEEP),
    "list": _replace("manifest.json", b"[]"),
    "no utf-8": _replace("manifest.json", b'{"\xff": 1}'),
    "zeros": _replace("manifest.json", "/dev/zero"),
    "pipe": _replace("manifest.json", "fifo"),
    "no format": _json("manifest.json", format=...),
    "numbers": _json("manifest.json", format=5, splits=7, files=3, step="x", source=0),
}

INPUTS: dict[str, dict[str, Make]] = {
    "train": {
        **{
            f"--config.{key}={value[:12]}": _flags(f"--config.{key}={value}")
            for key, values in {
                "optim.lr": ("nan", "inf", "-1", "1e400", "x", "1" + "0" * 400),
                "optim.eps": ("0", "nan"),
                "optim.weight_decay": ("inf", "-inf"),
                "optim.betas": ("(nan,0.9)", "(0.9,1.0)", "0.9", "()", "(0.9,'x')"),
                "trainer.max_steps": ("1e30", "-1", "0", "1" + "0" * 400, "9" * 5000, ""),
                "trainer.seed": (str(2**64), "-1"),
                "trainer.devices": ("-1", "1000000"),
                "trainer.grad_clip": ("nan",),
                "trainer.spike_zscore": ("inf",),
                "trainer.ema_decay": ("nan", "1"),
                "trainer.global_batch_size": ("0", "1000000000000"),
                "trainer.sample_tokens": ("-1",),
                "trainer.precision": ("fp8", ""),
                "trainer.benchmarks": ("x", "hellaswag=/nowhere", "lambada=/dev/zero"),
                "data.batch_size": ("0", "True", str(2**63)),
                "data.seq_len": ("0", "-5", "999999999999"),
                "data.seed": (str(2**64), "-1"),
                "data.path": ("/nowhere", "\0", "a" * 5000, "/dev/zero", "~nobody-there/x"),
                "model.init_std": ("nan", "-1"),
                "model.resid_dropout": ("nan", "1.5"),
                "model.rotary_base": ("0", "-1", "inf"),
                "model.mlp_ratio": ("inf", "nan", "0"),
                "model.num_layers": ("0", "1000000000"),
                "model.d_model": ("1000000000000", "-16"),
                "model.vocab_size": ("-1", "1000000000000", "2"),
                "model.family": ("", "x"),
                "model.layer_norm_eps": ("nan",),
            }.items()
            for value in values
        },
        "workdir no utf-8": lambda place: [b"--workdir=run\xff\xfe"],
        "workdir odd": _flags("--workdir=a [b] {c} = d,\n*?e"),
        "workdir too long": _flags("--workdir=" + "w" * 300),
        "workdir path too long": _flags("--workdir=" + "w/" * 3000),
        "workdir null": _flags("--workdir=a\0b"),
        "workdir file": _file("file", b"", "--workdir=file"),
        "workdir pipe": _pipe("pipe", "--workdir=pipe"),
        "workdir of nobody": _flags("--workdir=~nobody-there/run"),
        "profile": _flags("--profile=9999999999999999999-1"),
        "config too long": _flags("--config=" + "c" * 5000),
        "config folder": _flags("--config=."),
        "config zero": _flags("--config=/dev/zero"),
        "config null": _flags("--config=a\0.py"),
        "config of nobody": _flags("--config=~nobody-there/x.py"),
        "config no utf-8": lambda place: [b"--config=\xff.py"],
        "config pipe": _pipe("pipe.py", "--config=pipe.py"),
        "config folder.py": _file("folder.py/x", b"", "--config=folder.py"),
        **{f"config {name}": _config(text) for name, text in RECIPES.items()},
        **{
            f"data manifest {name}": _copy("tokens", change, "--config.data.path=copy")
            for name, change in MANIFESTS.items()
        },
        **{
            f"checkpoint manifest {name}": _copy("run", change, "--workdir=copy")
            for name, change in MANIFESTS.items()
        },
        "checkpoint is a file": _copy(
            "run",
            lambda copy: (copy / "checkpoints" / "step_00000009").write_text(""),
            *("--workdir=copy", "--config.trainer.max_steps=3"),
        ),
        "metrics are a folder": _file("run/metrics.jsonl/x", b""),
        "summary is a folder": _file("run/summary.json/x", b""),
        "tensorboard is a file": _file("run/tensorboard", b""),
        "checkpoints are a file": _file("run/checkpoints", b""),
    },
    "eval": {
        "nothing": _flags("--checkpoint=nowhere"),
        "too long": _flags("--checkpoint=" + "c" * 5000),
        "null": _flags("--checkpoint=a\0"),
        "no utf-8": lambda place: [b"--checkpoint=\xff"],
        "of nobody": _flags("--checkpoint=~nobody-there/x"),
        "batch": _flags("--batch_size=x"),
        "huge batch": _flags(f"--batch_size={10**30}"),
        "devices": _flags("--devices=-3"),
        "benchmark": _flags("--benchmarks=hellaswag=/dev/zero"),
        "benchmark name": _flags("--benchmarks=x=y,=,"),
        "deep": _file("deep.jsonl", DEEP, "--benchmarks=hellaswag=deep.jsonl"),
        "lists": _file("deep.jsonl", b"[]\n3\n", "--benchmarks=hellaswag=deep.jsonl"),
        "mark": _file("m.jsonl", b'\xef\xbb\xbf{"text": "a b"}\n', "--benchmarks=lambada=m.jsonl"),
        "binary": _file("b.raw", b"\xff\xfe\0" * 99, "--benchmarks=wikitext=b.raw"),
        **{
            f"manifest {name}": _copy("run", change, "--checkpoint=copy")
            for name, change in MANIFESTS.items()
        },
        "no data any more": _copy(
            "run", lambda copy: None, "--checkpoint=copy", "--benchmarks=lambada=/nowhere"
        ),
    },
    "generate": {
        "nothing": _flags("--checkpoint=nowhere"),
        "zero": _flags("--checkpoint=/dev/zero"),
        "prompt no utf-8": lambda place: [b"--prompt=\xc3"],
        "prompt empty": _flags("--prompt="),
        "prompt null": _flags("--prompt=\0"),
        "prompt long": _flags("--prompt=" + "word " * 9999),
        "temperature nan": _flags("--temperature=nan"),
        "temperature tiny": _flags("--temperature=1e-40"),
        "temperature negative": _flags("--temperature=-1"),
        "temperature inf": _flags("--temperature=inf"),
        "top_p": _flags("--top_p=nan"),
        "top_p 0": _flags("--top_p=0"),
        "top_k": _flags("--top_k=-1"),
        "top_k huge": _flags(f"--top_k={10**30}"),
        "seed": _flags(f"--seed={2**64}"),
        "seed negative": _flags(f"--seed={-(2**70)}"),
        "tokens": _flags(f"--max_new_tokens={10**30}"),
        **{
            f"manifest {name}": _copy("run", change, "--checkpoint=copy")
            for name, change in MANIFESTS.items()
        },
        **{
            f"hugging face {name}": _file("hf/config.json", content, "--checkpoint=hf")
            for name, content in {
                "empty": b"",
                "deep": DEEP,
                "list": b"[]",
                "nothing": b"{}",
                "huge": json.dumps(
                    {"n_embd": 10**12, "n_layer": 10**9, "n_head": 1, "n_positions": 8}
                ).encode(),
                "text": json.dumps(
                    {"n_embd": "x", "n_layer": None, "n_head": 0, "vocab_size": -1}
                ).encode(),
            }.items()
        },
        "hugging face pipe": _pipe("hf/config.json", "--checkpoint=hf"),
    },
    "prepare_data": {
        "brackets": _file("a[b]/c.txt", b"x " * 999, "--dataset=text:a[[]b]/*.txt"),
        "no utf-8": _file("a.txt", b"\xff\xfe" * 99, "--dataset=text:a.txt"),
        "empty": _file("a.txt", b"", "--dataset=text:a.txt"),
        "json deep": _file("a.jsonl", DEEP + b"\n", "--dataset=jsonl:a.jsonl:text"),
        "json list": _file("a.jsonl", b"[]\n", "--dataset=jsonl:a.jsonl:text"),
        "json cut": _file("a.jsonl", b'{"text": "a', "--dataset=jsonl:a.jsonl:text"),
        "json number": _file("a.jsonl", b'{"text": 3}\n', "--dataset=jsonl:a.jsonl:text"),
        "gzip": _file("a.jsonl.gz", b"\x1f\x8bnonsense", "--dataset=jsonl:a.jsonl.gz:text"),
        "zstd": _file("a.jsonl.zst", b"nonsense", "--dataset=jsonl:a.jsonl.zst:text"),
        "parquet": _file("a.parquet", b"PAR1nonsensePAR1", "--dataset=parquet:a.parquet:text"),
        "pipe": _pipe("a.txt", "--dataset=text:a.txt"),
        "zero": _flags("--dataset=text:/dev/zero"),
        "folder": _flags("--dataset=text:/proc"),
        "null": _flags("--dataset=text:a\0b"),
        "long": _flags("--dataset=text:" + "a" * 5000),
        "glob no utf-8": lambda place: [b"--dataset=text:\xff*"],
        "out no utf-8": lambda place: [b"--out=\xff"],
        "out long": _flags("--out=" + "a" * 300),
        "out file": _file("file", b"", "--out=file"),
        "out below a file": _file("file", b"", "--out=file/out"),
        "out in proc": _flags("--out=/proc/out"),
        "out of nobody": _flags("--out=~nobody-there/x"),
        "out null": _flags("--out=a\0"),
        "workers": _flags("--workers=-1"),
        "workers text": _flags("--workers=many"),
        "workers huge": _flags(f"--workers={10**30}"),
        "name": _flags("--dataset=no/such/thing"),
        "hub": _flags("--dataset=hf:no/such"),
        "odd text": _flags("--dataset=text:"),
        "odd json": _flags("--dataset=jsonl:"),
    },
    "inspect_data": {
        "nothing": _flags("--path=nowhere"),
        "null": _flags("--path=a\0"),
        "long": _flags("--path=" + "a" * 5000),
        "no utf-8": lambda place: [b"--path=\xff"],
        "of nobody": _flags("--path=~nobody-there/x"),
        "window": _flags("--window=-1"),
        "window huge": _flags(f"--window={10**30}"),
        "step huge": _flags(f"--step={10**30}"),
        "seq_len": _flags("--seq_len=0"),
        "seq_len huge": _flags(f"--seq_len={10**30}"),
        "seed": _flags(f"--seed={2**64}", "--step=0", "--global_batch_size=2"),
        "batch": _flags("--step=0", "--global_batch_size=0"),
        "digits": _flags("--step=" + "9" * 5000),
        **{
            f"manifest {name}": _copy("tokens", change, "--path=copy")
            for name, change in MANIFESTS.items()
        },
        "tokens zero": _copy("tokens", _replace("train.bin", "/dev/zero"), "--path=copy"),
        "tokens cut": _copy("tokens", _replace("train.bin", b"x"), "--path=copy"),
        "tokens pipe": _copy("tokens", _replace("train.bin", "fifo"), "--path=copy"),
    },
    "plot_loss": {
        "nothing": _flags("--runs=nowhere"),
        "null": _flags("--runs=a\0"),
        "long": _flags("--runs=" + "a" * 5000),
        "no utf-8": lambda place: [b"--runs=\xff"],
        "equals": _copy("run", lambda copy: copy.rename("a=b,c [*]"), "--runs=a=b,c [*]"),
        "label": _copy("run", lambda copy: copy.rename("a=b,c"), "--runs=$x$=a=b,c,y_{=a=b,c"),
        "label no utf-8": lambda place: [f"--runs=\udcff={place.run}"],
        "deep": _file("r/metrics.jsonl", DEEP + b"\n", "--runs=r"),
        "list": _file("r/metrics.jsonl", b"[]\n", "--runs=r"),
        "no step": _file("r/metrics.jsonl", b'{"train/loss": 1}\n', "--runs=r"),
        "text": _file("r/metrics.jsonl", b'{"step": "x", "train/loss": "y"}\n', "--runs=r"),
        "cut": _file("r/metrics.jsonl", b'{"step": 1, "train/loss": 1}\n{"st', "--runs=r"),
        "binary": _file("r/metrics.jsonl", b"\xff\n", "--runs=r"),
        "empty": _file("r/metrics.jsonl", b"", "--runs=r"),
        "pipe": _pipe("r/metrics.jsonl", "--runs=r"),
        "out folder": _flags("--out=."),
        "out ending": _flags("--out=loss.docx"),
        "out none": _flags("--out="),
        "out null": _flags("--out=\0.svg"),
        "out long": _flags("--out=" + "a" * 300 + ".svg"),
        "out no utf-8": lambda place: [b"--out=\xff.svg"],
    },
}
