"""What ``zo-opt federated`` can be told. Needs no torch, so that help is quick."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from zo_opt.training.options import GROUPS, NonNegativeInt, PositiveFloat, PositiveInt

# Of the options of a run, those that a federated training has; what moves the weights is its own.
_OF_A_RUN = frozenset(
    ("model_name_or_path", "task", "train_file", "eval_file", "template", "verbalizers", "lr", "output_dir",
     "text_column", "label_column", "target_column", "max_train_rows", "held_out", "max_length", "max_new_tokens", "batch_size",
     "eval_batch_size", "head", "trust_remote_code", "device", "precision", "quantise", "adapter", "zo_eps", "lr_schedule", "seed")
)  # fmt: skip
SKIPPED = frozenset(f.name for group in GROUPS for f in fields(group)) - _OF_A_RUN


@dataclass(frozen=True, kw_only=True)
class FederatedConfig:
    """How a federated training goes, beside options of a run.

    Args:
        pool_size: seeds in the pool: the tuned model is so many numbers.
        seeds_a_round: seeds that a client evaluates in a round, each followed by a local step.
        rounds: of the whole training.
        seed_choice: uniform; or magnitude, seeds whose numbers were large so far being likelier (FedKSeed-Pro).
        most_rows: rows that a client with many has: one with fewer counts less, in proportion, one with more no more; every client alike
            if not given. Not with privacy, which hides how many rows a client has.
        clip: bound on a derivative along a direction, and so on how far a client can move a weight; with privacy, on the norm of a
            client's derivatives of a round.
        fraction: share of the connected clients that a round asks.
        min_clients: a round waits until so many are connected.
        round_timeout: seconds after which a round ends without the answers that are missing.
        late: rounds after its own in which an answer is still taken.
        eval_rounds: rounds between evaluations on the server's held-out rows; the last round always has one.
        label_skew: where Flower simulates the clients: training rows are dealt by a Dirichlet distribution of this concentration for each
            label; evenly if not given.
        privacy_epsilon: differential privacy of each client, all its rows together: noise such that all its answers stay within this
            epsilon, whoever sees them.
        privacy_delta: its delta; well below 1 / clients.
        privacy_noise: the noise on each derivative, in units of clip, in place of privacy_epsilon.
    """

    pool_size: PositiveInt = 1024
    seeds_a_round: PositiveInt = 4
    rounds: PositiveInt = 100
    seed_choice: Literal["uniform", "magnitude"] = "uniform"
    most_rows: PositiveInt | None = None
    clip: PositiveFloat = 5.0
    fraction: PositiveFloat = 1.0
    min_clients: PositiveInt = 2
    round_timeout: PositiveFloat = 600.0
    late: NonNegativeInt = 1
    eval_rounds: PositiveInt = 10
    label_skew: PositiveFloat | None = None
    privacy_epsilon: PositiveFloat | None = None
    privacy_delta: PositiveFloat = 1e-5
    privacy_noise: PositiveFloat | None = None
