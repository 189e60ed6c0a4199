import json

import pytest

from flashtrain.errors import UserError
from flashtrain.models.gpt import GPTConfig
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
        ({"optim": {"lr": float("inf")}}, r"optim.lr must be at most 3e\+38, got inf"),
        ({"optim": {"lr": 10**400}}, r"optim.lr must be at most 3e\+38, got 1000"),
        ({"optim": {"betas": 0.9}}, "optim.betas must be 2 numbers, got 0.9"),
        ({"optim": {"betas": [0.9, "x"]}}, "optim.betas must be float, got 'x'"),
        ({"optim": {"eps": 0.0}}, "optim.eps must be at least 1e-30, got 0.0"),
        ({"optim": {"weight_decay": float("-inf")}}, "optim.weight_decay must be at least 0"),
        ({"optim": 3}, "config section optim must hold keys, got 3"),
        ({"trainer": {"max_steps": 2**60}}, "trainer.max_steps must be at most 1099511627776"),
        ({"trainer": {"max_steps": 10**5000}}, "trainer.max_steps must be at most"),
        ({"trainer": {"devices": 10**6}}, "trainer.devices must be at most 1024, got 1000000"),
        ({"trainer": {"seed": 2**64}}, "trainer.seed must be at most 18446744073709551615"),
        ({"trainer": {"save_every": 2**63}}, "trainer.save_every must be at most 92233"),
        ({"data": {"seed": -1}}, "data.seed must be at least 0, got -1"),
        ({"data": {"seed": 1.0}}, "data.seed must be int, got 1.0"),
        ({"data": {"path": None}}, "data.path must be str, got None"),
        ({"data": {"batch_size": True}}, "data.batch_size must be int, got True"),
        ({"data": {"batch_size": 2**31}}, "data.batch_size must be at most 4194304"),
        ({"trainer": {"precision": "fp8"}}, "'fp8' is not known"),
        ({"data": {"batch_size": -1}}, "data.batch_size must be at least 0, got -1"),
        ({"trainer": {"strategy": "fsdp"}}, "'fsdp' is not known; did you mean 'fsdp2'"),
        (
            {"trainer": {"low_precision_weights": True}},
            "low_precision_weights needs trainer.precision to be bf16 or fp16, got fp32",
        ),
        (
            {"trainer": {"low_precision_weights": True, "precision": "bf16", "ema_decay": 0.9}},
            "low_precision_weights needs trainer.ema_decay to be 0.0, got 0.9",
        ),
        ({"trainer": {"ema_decay": 1.0}}, r"trainer.ema_decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_mistakes(sections: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config(**sections)


def test_contradictions_name_what_differs() -> None:
    saved = run_config(model={"d_model": 4}, optim={"lr": 0.1}).to_dict()
    now = run_config(model={"d_model": 8, "num_layers": 1}, optim={"lr": 0.1}).to_dict()
    assert contradictions(saved, saved, GPTConfig) == []
    assert contradictions(saved, now, GPTConfig) == [
        "model.d_model (checkpoint: 4, now: 8)",
        "model.num_layers (checkpoint: not set, now: 1)",
    ]


def test_keys_that_a_checkpoint_does_not_know_have_their_defaults() -> None:
    now = run_config(model={"d_model": 4, "mlp_ratio": 4.0}).to_dict()
    saved = json.loads(json.dumps(now))
    for section, key in (("model", "mlp_ratio"), ("optim", "betas"), ("trainer", "strategy")):
        del saved[section][key]
    assert contradictions(saved, now, GPTConfig) == []
    now["model"]["mlp_ratio"] = 2.0
    assert contradictions(saved, now, GPTConfig) == ["model.mlp_ratio (checkpoint: 4.0, now: 2.0)"]


def test_what_does_not_change_a_step_may_change() -> None:
    saved = run_config().to_dict()
    now = run_config(
        data={"batch_size": 2}, trainer={"max_steps": 7, "devices": 2, "save_every": 3}
    ).to_dict()
    assert contradictions(saved, now, GPTConfig) == []
    existing = {f"{s}.{k}" for s in ("data", "trainer") for k in saved[s]}
    assert existing >= RESUMABLE_KEYS
