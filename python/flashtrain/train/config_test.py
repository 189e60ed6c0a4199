import json

import pytest

from flashtrain.errors import UserError
from flashtrain.train.build import batch_sizes
from flashtrain.train.config import RESUMABLE_KEYS, RunConfig, contradictions


def run_config(**sections: dict) -> RunConfig:
    data = {"batch_size": 4, "seq_len": 8} | sections.pop("data", {})
    return RunConfig.from_mapping("test", {"data": data, **sections})


def test_defaults_and_json() -> None:
    config = run_config(model={"d_model": 4})
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert config.to_dict()["optim"]["betas"] == [0.9, 0.999]


def test_ints_stand_for_floats_but_not_bools() -> None:
    assert run_config(optim={"lr": 1}).optim.lr == 1.0
    with pytest.raises(UserError, match=r"optim\.lr must be float, got True"):
        run_config(optim={"lr": True})
    with pytest.raises(UserError, match=r"trainer\.max_steps must be int, got 1\.5"):
        run_config(trainer={"max_steps": 1.5})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainr": {}}, "no section is called 'trainr'; did you mean 'trainer'"),
        ({"optim": {"rl": 1.0}}, r"optim.rl does not exist; did you mean 'lr'\?"),
        ({"optim": {"lr": float("nan")}}, "optim.lr must be at least 0, got nan"),
        ({"optim": {"betas": [0.9, 1.0]}}, r"optim.betas must lie in \[0, 1\)"),
        ({"trainer": {"precision": "fp8"}}, "'fp8' is not known"),
        ({"data": {"seq_len": 0}}, "data.seq_len must be an integer of at least 1, got 0"),
    ],
)
def test_mistakes(sections: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config(**sections)


def test_contradictions_name_what_differs() -> None:
    saved = run_config(model={"d_model": 4}, optim={"lr": 0.1}).to_dict()
    now = run_config(model={"d_model": 8, "num_layers": 1}, optim={"lr": 0.1}).to_dict()
    assert contradictions(saved, saved) == []
    assert contradictions(saved, now) == [
        "model.d_model (checkpoint: 4, now: 8)",
        "model.num_layers (checkpoint: not set, now: 1)",
    ]


def test_what_does_not_change_a_step_may_change() -> None:
    saved = run_config().to_dict()
    now = run_config(
        data={"batch_size": 2}, trainer={"max_steps": 7, "devices": 2, "save_every": 3}
    ).to_dict()
    assert contradictions(saved, now) == []
    existing = {f"{s}.{k}" for s in ("data", "trainer") for k in saved[s]}
    assert existing >= RESUMABLE_KEYS


@pytest.mark.parametrize(
    ("total", "micro", "ranks", "expected"),
    [
        (16, 4, 1, (4, 4)),
        (16, 4, 2, (4, 2)),
        (16, 16, 2, (8, 1)),
        (16, 64, 1, (16, 1)),
        (3, 1, 3, (1, 1)),
    ],
)
def test_global_batch_is_kept(total: int, micro: int, ranks: int, expected: tuple) -> None:
    config = run_config(trainer={"global_batch_size": total}, data={"batch_size": micro})
    sizes = batch_sizes(config, ranks)
    assert (sizes.micro, sizes.accumulation) == expected
    assert sizes.micro * sizes.accumulation * ranks == total


def test_uneven_batches_are_refused() -> None:
    config = run_config(trainer={"global_batch_size": 12}, data={"batch_size": 5})
    with pytest.raises(UserError, match=r"that fit: 4 or 6; .*batch_size: 10 or 15"):
        batch_sizes(config, 1)
    with pytest.raises(UserError, match="evenly by 5 processes; the nearest that can: 10 or 15"):
        batch_sizes(config, 5)
