"""Public reports about how programs start, held against ours.

meta-llama/llama#391 and pytorch/examples#458, WORLD_SIZE or RANK left in the shell, are tested in
python/flashtrain/environment and, with every program, in tests/hostile.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import train_binary

UNSHARE = ("unshare", "--map-root-user", "--uts")


def _may_unshare() -> bool:
    if shutil.which(UNSHARE[0]) is None:
        return False
    return subprocess.run([*UNSHARE, "hostname", "x"], capture_output=True).returncode == 0


@pytest.mark.skipif(not _may_unshare(), reason="the host's name cannot be changed here")
def test_a_host_name_that_resolves_to_nothing(tmp_path: Path) -> None:
    """meta-llama/llama#391, tensorflow/tensorboard#1068: and proxies that lead nowhere."""
    data = train_binary.make_data(tmp_path / "words", train=4_000)
    nowhere = "http://127.0.0.1:9"
    arguments = (
        *train_binary.SMALL_MODEL,
        data,
        "--config.trainer.devices=2",
        "--config.trainer.max_steps=2",
        "--config.trainer.eval_every=0",
        "--config.trainer.save_every=0",
        "--config.trainer.sample_tokens=0",
    )
    result = subprocess.run(
        [
            *(*UNSHARE, "sh", "-c", 'hostname no-such-host && exec "$@"', "sh"),
            *(*train_binary.command(), *arguments),
        ],
        cwd=tmp_path,
        env=train_binary.environment(http_proxy=nowhere, https_proxy=nowhere, all_proxy=nowhere),
        capture_output=True,
        text=True,
        timeout=train_binary.TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
