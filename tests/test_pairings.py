"""Methods by name: each makes a run that passes its own checks, whatever a user gave for the others."""

from __future__ import annotations

from typing import Any

import pytest

from zo_opt.adapters import ADAPTERS
from zo_opt.comparison.config import CompareConfig
from zo_opt.comparison.options import check, run_config
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS
from zo_opt.training.config import TrainConfig
from zo_opt.training.pairings import PAIRINGS, get_pairing

NAMED = [
    "full",
    "bitfit",
    "lora",
    "lora+",
    "dora",
    "adalora",
    "lora-fa",
    "vera",
    "aflora",
    "lisa",
    "lamda",
    "lamda++",
    "adapter",
    "loretta",
    "mezo",
    "mezo-lora",
    "sparse-mezo",
    "adazeta",
]
COMBINED = [f"{optimizer}:{adapter}" for optimizer, adapter in zip(OPTIMIZERS, list(ADAPTERS) * 2, strict=False)]

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "adapters": {
        "adapter": {"rank": 4, "alpha": 8.0, "bottleneck": 16, "scale": 2.0, "tt_rank": 3, "activation": "gelu"}
    },
    "modules": {"adapter": {"layers": 2, "tensorize_rank": 3, "rank_pattern": {"q_proj": 2}}},
    "zeroth order": {"query_mode": "sequential", "schedule": {"name": "linear", "end": 9}},
    "directions and update rule": {"directions": "gaussian", "update_rule": "adam"},
}


def test_the_names_of_the_issue_are_there() -> None:
    assert set(NAMED) <= set(PAIRINGS)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [*PAIRINGS, *COMBINED])
def test_a_run_passes_its_checks(name: str, options: str) -> None:
    pairing = get_pairing(name)
    config = run_config(TrainConfig(**OPTIONS[options]), pairing)
    config.check()
    assert (config.optimizer_name, config.adapter_name) == (pairing.optimizer, pairing.adapter)
    assert TrainConfig.from_dict(config.given()) == config


def test_what_the_user_gave_wins_over_the_methods_own() -> None:
    assert run_config(TrainConfig(query_mode="split"), get_pairing("mezo-lora")).query_mode == "split"
    assert run_config(TrainConfig(), get_pairing("mezo-lora")).query_mode == "auto"
    assert run_config(TrainConfig(adapter={"rank": 3}), get_pairing("lora")).make_adapter().rank == 3
    assert run_config(TrainConfig(adapter={"tt_rank": 3}), get_pairing("lora")).adapter == {"name": "lora"}
    assert run_config(TrainConfig(), get_pairing("tt-lora-answers")).on_answers
    assert run_config(TrainConfig(), get_pairing("adazeta-feedback")).on_activations
    assert not run_config(TrainConfig(), get_pairing("adazeta")).on_activations


@pytest.mark.parametrize("name", ["", "loar", "lora:mezo", "mezo:", ":lora"])
def test_names_that_are_not_known(name: str) -> None:
    with pytest.raises(ZOError, match="not known"):
        get_pairing(name)


def test_methods_as_a_list_or_a_word() -> None:
    for methods in ("lora, mezo-lora", ["lora", "mezo-lora"]):
        assert [m.name for m in check(CompareConfig(methods=methods, seeds=[0, 1]))] == ["lora", "mezo-lora"]
    assert CompareConfig(seeds="0,1").seed_list == [0, 1] == CompareConfig(seeds=[0, 1]).seed_list


def test_one_rank_for_all_is_where_adalora_ends() -> None:
    adapter = run_config(TrainConfig(adapter={"rank": 4}), get_pairing("adalora")).make_adapter()
    assert vars(adapter)["target_rank"] == 4
    assert vars(adapter)["rank"] == 6
