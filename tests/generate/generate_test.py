"""Text from trained models: runs, checkpoints, Hugging Face folders; mistakes get one line."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import train_binary

from experiments import generate as program
from flashtrain.errors import UserError
from flashtrain.models.gpt import GPT, GPTConfig
from flashtrain.models.hf_gpt2 import to_hf
from flashtrain.train import checkpoint
from flashtrain.train.load_model import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the words of the small dataset, with a moving average."""
    folder = tmp_path_factory.mktemp("generate")
    data = train_binary.make_data(folder / "words")
    arguments = (
        *train_binary.SMALL_MODEL,
        data,
        "--config.trainer.max_steps=300",
        "--config.trainer.save_every=200",
        "--config.trainer.ema_decay=0.9",
        f"--workdir={folder / 'run'}",
    )
    train_binary.train(*arguments, cwd=folder)
    return folder / "run"


@pytest.fixture
def generate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Runs the program in this process; the texts that it wrote."""

    def run(checkpoint_folder: Path, *arguments: str) -> list[str]:
        flag = f"--checkpoint={checkpoint_folder}"
        monkeypatch.setattr(sys, "argv", ["generate", flag, "--device=cpu", *arguments])
        assert program.main() == 0
        output = capsys.readouterr().out
        samples = json.loads(output.splitlines()[-1])["samples"]
        for sample in samples:
            assert sample["text"] in output
            assert sample["text"].startswith(sample["prompt"])
        return [sample["text"] for sample in samples]

    return run


def test_a_run_continues_what_it_was_trained_on(run_folder, generate):
    """Among its words are "thou art" and "a queen", and no others that begin so."""
    texts = generate(
        run_folder, "--prompt=thou", "--prompt=the a qu", "--max_new_tokens=4", "--temperature=0"
    )
    assert texts == ["thou art", "the a queen "]
    assert generate(run_folder, "--prompt=thou", "--max_new_tokens=4", "--top_k=1") == ["thou art"]


def test_samples_follow_the_seed(run_folder, generate):
    options = ("--prompt=the ", "--max_new_tokens=40", "--temperature=1.5")
    first = generate(run_folder, *options, "--seed=1")
    assert generate(run_folder, *options, "--seed=1") == first
    assert generate(run_folder, *options, "--seed=2") != first
    assert generate(run_folder, *options, "--seed=1", "--top_p=0.3") != first


def test_a_prompt_that_is_cut_in_a_character_ends_in_a_replacement(run_folder, generate):
    """openai/tiktoken#82, huggingface/transformers#8886."""
    cut = "thou caf\udcc3"  # as Python has the bytes of a command line that are not UTF-8
    options = ("--max_new_tokens=3", "--temperature=1e-40", f"--top_k={10**9}")
    [text] = generate(run_folder, f"--prompt={cut}", *options)
    assert text.startswith("thou caf\ufffd")


def test_a_checkpoint_and_its_average_are_what_was_saved(run_folder):
    saved = checkpoint.paths(run_folder / "checkpoints")
    assert [path.name for path in saved] == ["step_00000300", "step_00000200"]
    for path in saved:
        reader = checkpoint.Reader(checkpoint.read(path))
        for ema, prefix in ((False, "model."), (True, "ema.")):
            loaded = load_model(path, CPU, ema=ema)
            assert not loaded.model.training
            assert loaded.tokenizer.name == "bytes"
            assert loaded.config is not None
            for name, parameter in loaded.model.named_parameters():
                assert torch.equal(parameter, reader.read(prefix + name)), name
    newest = load_model(run_folder, CPU).model
    for a, b in zip(newest.parameters(), load_model(saved[0], CPU).model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_hugging_face_folder_has_gpt2s_tokens(tmp_path, generate):
    torch.manual_seed(0)
    model = GPT(GPTConfig(50257, num_layers=1, d_model=8, num_heads=2, max_seq_len=16, fused=False))
    to_hf(model, tmp_path / "hf")
    loaded = load_model(tmp_path / "hf", CPU)
    assert loaded.config is None
    prompt = "Hello, world"
    assert loaded.tokenizer.encode(prompt) == [15496, 11, 995]
    [text] = generate(tmp_path / "hf", f"--prompt={prompt}", "--max_new_tokens=5")
    tokens = torch.tensor([loaded.tokenizer.encode(prompt)])
    generator = torch.Generator().manual_seed(0)
    expected = model.generate(tokens, 5, temperature=0.8, generator=generator)
    assert text == loaded.tokenizer.decode(expected[0].tolist())


def test_mistakes_get_one_line(run_folder, tmp_path, generate):
    def refusal(*arguments: str, folder: Path = run_folder) -> str:
        with pytest.raises(UserError) as caught:
            generate(folder, *arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no flag --promt; did you mean '--prompt'?" in refusal("--promt=x")
    assert "--max_new_tokens=many is not" in refusal("--max_new_tokens=many")
    assert "--max_new_tokens=-1 must be in 0.." in refusal("--max_new_tokens=-1")
    assert "do not fit into memory" in refusal(f"--max_new_tokens={2**50}")
    for flag in (f"--seed={2**64}", "--seed=-1", "--top_k=-1"):
        assert f"{flag} must be in 0.." in refusal(flag)
    for value in ("nan", "inf"):
        assert f"temperature={value} must be 0" in refusal(f"--temperature={value}")
    assert "top_p=nan must be in (0, 1]" in refusal("--top_p=nan")
    assert "--device=gpu is not known; valid: auto, cpu, cuda" in refusal("--device=gpu")
    assert "temperature=-1.0 must be 0" in refusal("--temperature=-1")
    assert "top_p=2.0 must be in (0, 1]" in refusal("--top_p=2")
    assert "the prompt is empty" in refusal("--prompt=")
    assert "unexpected argument 'x'" in refusal("x")
    assert f"{tmp_path} holds no model" in refusal(folder=tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert "holds no checkpoint yet" in refusal(folder=tmp_path)
    saved = checkpoint.paths(run_folder / "checkpoints")[0]
    broken = tmp_path / "checkpoints" / saved.name
    broken.mkdir()
    for file in saved.iterdir():
        os.link(file, broken / file.name)
    weights = next(broken.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    assert "is missing or damaged" in refusal(folder=broken)
    assert "every checkpoint in" in refusal(folder=tmp_path)


def test_without_a_checkpoint_the_flag_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate"])
    with pytest.raises(UserError, match="--checkpoint=<folder> names the model"):
        program.main()
    monkeypatch.setattr(sys, "argv", ["generate", "--help"])
    assert program.main() == 0
    assert "--max_new_tokens=<value>" in capsys.readouterr().out
