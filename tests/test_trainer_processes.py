"""The Trainer in several processes, as torchrun starts them; here forks of the test's own."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState
from trainer_runs import Steps, adapted, weights, zo_trainer

from zo_opt import ZOError


def course(directory: Path, **options: Any) -> dict[str, Any]:
    steps, model = Steps(), adapted()
    zo_trainer(
        model, directory, callbacks=[steps], max_steps=3, zo_optimizer="mezo", max_queries=2, zo_eps=1e-2, **options
    ).train()
    return {"losses": [r.loss for r in steps.records], "weights": [w.flatten().tolist() for w in weights(model)]}


def two_ranks(directory: Path, **options: Any) -> list[dict[str, Any]]:
    """What each of two forks found, in a fresh process group."""
    children = []
    for rank in range(2):
        if pid := os.fork():
            children.append(pid)
            continue
        try:
            os.environ.update(
                OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"
            )
            AcceleratorState._reset_state(True)
            dist.init_process_group("gloo", init_method=f"file://{directory}/join", rank=rank, world_size=2)
            found = course(directory / "out", **options)
        except ZOError as error:
            found = {"said": str(error)}
        except BaseException:
            found = {"traceback": traceback.format_exc()}
        try:
            (directory / f"{rank}.json").write_text(json.dumps(found))
        finally:
            os._exit(0)
    for pid in children:
        os.waitpid(pid, 0)
    results = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]
    assert not (failed := [r["traceback"] for r in results if "traceback" in r]), failed[0]
    return results


def test_two_ranks_share_the_rows_and_stay_equal_to_the_bit(tmp_path: Path) -> None:
    """Two rows a rank against four in one process: the same tokens, each counted once; tolerance: rounding of losses over 2 zo_eps."""
    alone = course(tmp_path / "alone")
    one, other = two_ranks(tmp_path, query_mode="distributed", per_device_train_batch_size=2)
    assert one == other
    assert one["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    for mine, theirs in zip(one["weights"], alone["weights"], strict=True):
        assert mine == pytest.approx(theirs, abs=3e-5)


def test_ranks_that_would_go_their_own_ways_are_stopped(tmp_path: Path) -> None:
    for found in two_ranks(tmp_path):
        assert "launched in 2 processes" in found["said"] and "query_mode='distributed'" in found["said"]
