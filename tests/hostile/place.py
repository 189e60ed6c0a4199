"""Commands that work, and a folder with all that they need."""

import os
from pathlib import Path

import train_binary


class Place:
    """Good input for every program, made once, and a folder of its own for each case."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = train_binary.make_data(folder / "tokens", train=4_000)
        (folder / "text").mkdir()
        for name in ("a.txt", "b.txt"):
            (folder / "text" / name).write_text("To be or not to be, that is the question.\n" * 99)
        self.run = folder / "run"
        self.count = 0

    def arguments(self, program: str) -> list[str]:
        """A command that works."""
        return {
            "train": [*TINY, self.data, "--workdir=run"],
            "eval": [
                *(f"--checkpoint={self.run}", "--precision=fp32", "--device=cpu"),
                "--batch_size=16",
            ],
            "generate": [f"--checkpoint={self.run}", "--device=cpu", "--max_new_tokens=4"],
            "prepare_data": [
                f"--dataset=text:{self.folder}/text/*.txt",
                "--out=out",
                "--workers=1",
            ],
            "inspect_data": [f"--path={self.folder}/tokens", "--window=0", "--seq_len=32"],
            "plot_loss": [f"--runs={self.run}", "--out=loss.svg"],
        }[program]

    def environment(self) -> dict[str, str]:
        """What a shell has."""
        kept = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "RUNFILES_DIR", "RUNFILES_MANIFEST_FILE")
        env = {name: os.environ[name] for name in kept if name in os.environ}
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return env | {
            "HOME": str(home),
            "USER": "user",
            "OMP_NUM_THREADS": "1",
            "DATA_DIR": str(self.folder / "data"),
            "HF_HUB_OFFLINE": "1",
            "MPLCONFIGDIR": str(home),
        }

    def case(self) -> Path:
        """A new empty folder."""
        self.count += 1
        path = self.folder / f"case_{self.count}"
        path.mkdir()
        return path


TINY = (
    "--config.model.d_model=16",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.max_seq_len=32",
    "--config.data.seq_len=32",
    "--config.data.batch_size=2",
    "--config.trainer.global_batch_size=2",
    "--config.trainer.max_steps=2",
    "--config.trainer.log_every=1",
    "--config.trainer.eval_every=0",
    "--config.trainer.save_every=0",
    "--config.trainer.sample_tokens=2",
    "--config.trainer.device=cpu",
)
