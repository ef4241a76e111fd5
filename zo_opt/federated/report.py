"""What a federated training did so far, from its checkpoint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from zo_opt.federated.plan import Outline, plan_text
from zo_opt.federated.prepare import spent
from zo_opt.federated.server import Server


def report(directory: Path) -> dict[str, Any]:
    """Plain values: rounds, clients, bytes, refused messages, bounds, epsilon, evaluations.

    Raises:
        ZOError: there is no training in the directory, or its checkpoint is damaged.
    """
    outline = Outline.of(plan_text(directory))
    pool, delta = outline.pool, outline.rules.privacy_delta
    server = Server.load(directory, pool, say=lambda _: None)
    refused: Counter[str] = sum((record.refused for record in server.rounds), Counter())
    total = {
        name: sum(getattr(record, name) for record in server.rounds)
        for name in ("asked", "answered", "late", "behind", "sent", "received")
    }
    most = max((node.asked for node in server.nodes.values()), default=0)
    evaluations = [{"round": r.round + 1} | r.evaluation for r in server.rounds if r.evaluation is not None]
    return {
        "rounds": server.round, "of": pool.rounds, "clients": len(server.nodes), **total, "refused": dict(refused),
        "bytes_to_a_client_and_round": total["sent"] / max(1, total["asked"]),
        "bytes_from_a_client_and_round": total["received"] / max(1, total["answered"]),
        "bound_of_an_answer": pool.bound(0), "most_asked": most,
        "epsilon": spent(pool, most, delta) if pool.noise else None,
        "delta": delta if pool.noise else None, "evaluations": evaluations,
    }  # fmt: skip
