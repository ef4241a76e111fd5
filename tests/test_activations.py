"""Queries on activations: the mathematics against slow twins, the chain rule against autograd, learning, and the same bits again."""

from __future__ import annotations

import copy

import pytest
import torch
from test_answer_positions import adapted, batch_of, causal
from tiny_models import build, perturb

from zo_opt import AdaZeta, LoRAConfig, MeZO, TTConfig, TTLoRAConfig, get_adapter_model, trainable_parameters
from zo_opt.distributed import Distributed
from zo_opt.errors import ZOError
from zo_opt.estimators import LearnedFeedback
from zo_opt.estimators.activations import Measured
from zo_opt.estimators.feedback import Feedback, spsa
from zo_opt.optim import Adam

INPUT = {
    "rank": 3,
    "tt_rank": 8,
    "alpha": 3,
    "trainable": "input",
    "target_modules": ["o_proj", "down_proj"],
    "layers": 2,
}


def on_answers(name="llama", **options):
    model = get_adapter_model(causal(name)[0], TTLoRAConfig(**INPUT | {"positions": "answer"} | options))
    perturb(trainable_parameters(model))
    return model


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(*shape, seed=0):
    return 2 * torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).double() - 1


# --- the mathematics ---


def test_the_mean_jacobian_is_the_ridge_regression_of_all_steps_with_forgetting():
    width, hidden, ridge, forgetting = 5, 4, 0.7, 0.9
    feedback = Feedback.fresh(width, hidden, ridge)
    rows, weights = [], []
    for step in range(3):
        v, s = signs(2, 3, width, seed=step), draw(2, 3, hidden, seed=step)
        feedback.learn(v, s, forgetting)
        rows += [(a, b) for a, b in zip(v.reshape(-1, width), s.reshape(-1, hidden), strict=True)]
        weights = [w * forgetting for w in weights] + [1.0] * 6
    left = ridge * forgetting**3 * torch.eye(width, dtype=torch.float64)
    right = torch.zeros(width, hidden, dtype=torch.float64)
    for (v, s), weight in zip(rows, weights, strict=True):
        left, right = left + weight * torch.outer(v, v), right + weight * torch.outer(v, s)
    e = draw(6, hidden, seed=9)
    torch.testing.assert_close(feedback.mean(e), torch.stack([torch.linalg.inv(left) @ right @ row for row in e]))


def test_the_posterior_and_its_spread_are_those_of_a_gaussian_row_by_row():
    width, rows, queries, noise, rate = 6, 4, 3, 0.05, 0.2
    feedback = Feedback.fresh(width, 2, 1.0)
    root = draw(width, width, seed=1)
    feedback.spread_DD = spread = root @ root.T
    mean, v, y = draw(rows, width, seed=2), signs(queries, rows, width, seed=3), draw(queries, rows, seed=4)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = feedback.posterior(mean, v, y, weights, rate, noise)
    left_open = torch.stack([y[:, m] - v[:, m] @ mean[m] for m in range(rows)])
    variance = noise * (weights @ left_open.square()).mean()
    expected, change = [], torch.zeros(width, width, dtype=torch.float64)
    for m in range(rows):
        # Conditioning in precisions, not in covariances: another way to the same.
        precision = torch.linalg.inv(spread) + v[:, m].T @ v[:, m] / variance
        after = torch.linalg.inv(precision)
        move = after @ v[:, m].T @ left_open[m] / variance
        expected.append(mean[m] + move)
        change += weights[m] * (torch.outer(move, move) + after - spread)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(feedback.spread_DD, spread + rate * change, rtol=1e-6, atol=1e-8)


def test_spsa_of_all_directions_is_the_gradient():
    g = draw(3, 4)
    every = torch.tensor([[1.0 if q >> d & 1 else -1.0 for d in range(4)] for q in range(16)], dtype=torch.float64)
    v = every[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(spsa(v, torch.einsum("qmd,md->qm", v, g)), g)


def test_learned_feedback_finds_rows_that_differ_in_few_directions():
    """Rows' gradients lie near a mean in three directions of 40: with 8 queries a row, a cosine above 0.9 after 150 steps (SPSA: 0.4)."""
    width, rows, queries = 40, 16, 8
    basis, jacobian = torch.linalg.qr(draw(width, 3, seed=5))[0], draw(2, width, seed=6) / width**0.5
    estimator, memory, cosines = LearnedFeedback(), {}, []
    for step in range(150):
        e = draw(rows, 2, seed=100 + step)
        own = jacobian + torch.einsum("mck,dk->mcd", draw(rows, 2, 3, seed=300 + step), basis) * 0.3
        v = signs(queries, rows, width, seed=500 + step)
        s = torch.einsum("mcd,qmd->qmc", own, v)
        true = torch.einsum("mc,mcd->md", e, own)
        found = estimator.delta(memory, Measured(v, torch.einsum("mc,qmc->qm", e, s), s, e, own=True))
        cosines.append(float(torch.nn.functional.cosine_similarity(found, true, 1).mean()))
    alone = torch.nn.functional.cosine_similarity(spsa(v, torch.einsum("mc,qmc->qm", e, s)), true, 1).mean()
    assert sum(cosines[-20:]) / 20 > 0.9
    assert alone < 0.6


@pytest.mark.parametrize("lasting", [True, False])
def test_a_mean_that_foretells_nothing_is_said(lasting, recwarn):
    """A Jacobian that lasts, and one that is another in each step."""
    memory = {}
    for step in range(30):
        e, jacobian = draw(8, 3, seed=100 + step), draw(3, 20, seed=6 if lasting else 700 + step)
        v = signs(4, 8, 20, seed=500 + step)
        s = v @ jacobian.T
        LearnedFeedback().delta(memory, Measured(v, torch.einsum("mc,qmc->qm", e, s), s, e, own=True))
    said = [str(w.message) for w in recwarn if "foretold" in str(w.message)]
    assert len(said) == (not lasting)
    assert all('give estimator="activations"' in sentence for sentence in said)


@pytest.mark.parametrize("options", [{"forgetting": 1.5}, {"ridge": 0.0}, {"noise": -1.0}, {"rate": 2.0}])
def test_impossible_options_of_learned_feedback(options):
    with pytest.raises(ZOError, match=next(iter(options))):
        LearnedFeedback(**options)


# --- models ---


@pytest.mark.parametrize("name", ["llama", "opt, positions of real tokens", "bloom, alibi"])
@pytest.mark.parametrize("serial", [False, True])
def test_the_chain_rule_within_adapters_is_autograds(name, serial):
    """One row at a time through every direction of the basis gives dL/dh; from there on the parameters' gradients are exact."""
    targets = {"llama": ["o_proj", "down_proj"], "bloom, alibi": ["self_attention.dense"]}.get(name, ["fc2"])
    where = {"layers": 2, "positions": "answer", "target_modules": targets}
    config = TTConfig(rank=2, bottleneck=6, **where) if serial else TTLoRAConfig(**INPUT | where)
    model = get_adapter_model(causal(name)[0], config)
    perturb([p for m in model.adapted_modules().values() for p in m.adapter.parameters()])
    if serial:
        for module in model.adapted_modules().values():
            module.adapter.up.requires_grad_(False)
    batch = batch_of("left", answer=1)
    sites = model.activation_sites()

    def call():
        return model(**batch).loss

    with torch.no_grad():
        seen = sites.observe(call)
        eye, shift = torch.eye(sites.width), 1e-3
        v = eye[:, None, None].expand(-1, *seen.valid_NT.shape, -1)
        s = (sites.ends(call, shift * v) - sites.ends(call, -shift * v)) / (2 * shift)
        delta = torch.einsum("nth,dnth->ntd", seen.slope_NTH, s) * seen.valid_NT.unsqueeze(-1)
        found = sites.gradients(seen, delta)
    right = torch.autograd.grad(call(), list(sites.parameters))
    a, b = (torch.cat([g.flatten() for g in x]) for x in (found, right))
    assert float(torch.nn.functional.cosine_similarity(a, b, 0)) > 0.999
    assert 0.98 < float(a.norm() / b.norm()) < 1.02


def learn(model, batch, steps=60, closure=None, **options):
    options = {"lr": 2e-2, "estimator": "learned-feedback", "update_rule": Adam(beta2=0.99), "zo_eps": 3e-2} | options
    schedule = options.pop("query_schedule", {"name": "constant", "queries": 8})
    optimizer = AdaZeta(
        trainable_parameters(model),
        module=model,
        directions="rademacher",
        query_schedule=schedule,
        weight_decay=0.0,
        seed=0,
        **options,
    )
    closure = closure or (lambda b: model(**b).loss)
    return optimizer, [float(optimizer.step(closure, batch)) for _ in range(steps)]


def task_of(rows=16, tokens=9):
    """One token to predict, which follows from the last one of the prompt."""
    ids = torch.randint(10, 14, (rows, tokens), generator=torch.Generator().manual_seed(7))
    ids[:, -1] = ids[:, -2] - 5
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "labels": labels}


def test_a_plain_loop_learns_and_its_estimates_point_along_the_gradient():
    """Mean cosine above 0.5 from step 10 on, where SPSA on the same weights with the same queries stays below 0.2."""
    model, batch = on_answers(), task_of()
    parameters = trainable_parameters(model)
    optimizer, before = learn(model, batch, 10)
    cosines = []
    for _ in range(10):
        right = torch.autograd.grad(model(**batch).loss, parameters)
        optimizer.estimate(lambda b: model(**b).loss, batch)
        estimate = optimizer.pending[-1][0].gradient
        cosines.append(
            float(torch.nn.functional.cosine_similarity(estimate, torch.cat([g.flatten() for g in right]), 0))
        )
        optimizer.step()
    _, weights = learn(on_answers(), batch, 20, estimator="two-sided", lr=2e-3)
    assert sum(cosines) / 10 > 0.5
    assert optimizer.last_record.loss < 0.6 * before[0]
    assert optimizer.last_record.loss < weights[-1]
    assert optimizer.history.forwards == 20 * 9 + 3 and optimizer.history.tokens == optimizer.history.forwards * 32


def test_the_model_may_be_anything_whose_end_can_be_differentiated():
    """A number without a gradient: a query is a run of the closure. One number a sequence says more than one of them all."""
    batch = task_of()
    for closure, is_a_row_each in (
        (lambda m: lambda b: float(m(**b).loss), False),
        (lambda m: lambda b: rows_of(m, b), True),
    ):
        model = on_answers()
        optimizer, losses = learn(model, batch, 40, closure=closure(model), lr=1e-2)
        assert ("spread_DD" in optimizer.estimator_memory) == is_a_row_each
        assert optimizer.last_record.forwards == 9
        assert sum(losses[-5:]) < 5 * losses[0]


def rows_of(model, batch):
    """The loss of each sequence, as a number: nothing to differentiate."""
    logits = model(input_ids=batch["input_ids"][:, :-1]).logits[:, -1]
    return torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, -1], reduction="none").detach()


def test_what_a_model_writes_is_learned_from_a_number_a_row():
    """The model runs once a token; a row has one direction for all of them, and its inputs are their mean."""
    model, prompts = on_answers(), task_of()["input_ids"][:, :-1]

    def odd(_batch):
        written = model.wrapped.generate(input_ids=prompts, max_new_tokens=3, do_sample=False, pad_token_id=0)
        return 1 - (written[:, prompts.shape[1] :] % 2).double().mean(1)

    site = next(iter(model.adapted_modules().values()))
    inputs = []
    with site.register_forward_pre_hook(lambda _, args: inputs.append(args[0][:, -1])):
        seen = model.activation_sites().observe(lambda: odd(None))
    assert len(inputs) == 3 and seen.slope_NTH is None and seen.valid_NT.shape == (len(prompts), 1)
    torch.testing.assert_close(seen.inputs[0][:, 0], torch.stack(inputs).mean(0))
    optimizer, losses = learn(model, prompts, 25, closure=odd, lr=1e-2, zo_eps=0.3)
    assert optimizer.last_record.forwards == 9
    assert sum(losses[-5:]) < 0.4 * 5 * losses[0]


@pytest.mark.parametrize(
    "estimator",
    ["activations", {"name": "learned-feedback", "unbiased": True}, {"name": "learned-feedback", "rate": 0}],
)
def test_other_estimators_of_the_kind_learn_too(estimator):
    losses = learn(on_answers(), task_of(), 40, estimator=estimator, lr=1e-2)[1]
    assert sum(losses[-5:]) < 5 * losses[0]


def test_a_step_taken_up_again_is_the_same_to_the_bit():
    batch = task_of()
    whole = on_answers()
    learn(whole, batch, 9)
    model = on_answers()
    optimizer, _ = learn(model, batch, 4)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.trainable_state())
    model = on_answers()
    for name, value in weights.items():
        model.wrapped.get_parameter(name).data.copy_(value)
    optimizer, _ = learn(model, batch, 0)
    optimizer.load_state_dict(state)
    for _ in range(5):
        optimizer.step(lambda b: model(**b).loss, batch)
    assert all(torch.equal(a, b) for a, b in zip(trainable_parameters(whole), trainable_parameters(model), strict=True))


def test_a_new_head_behind_the_adapters_gets_its_exact_gradient():
    model = get_adapter_model(
        build("bert"),
        TTLoRAConfig(
            **INPUT
            | {
                "target_modules": ["output.dense"],
                "layers": 1,
                "positions": "answer",
                "modules_to_save": ["classifier", "pooler"],
            }
        ),
    )
    batch = {
        "input_ids": torch.randint(3, 50, (8, 7), generator=torch.Generator().manual_seed(1)),
        "labels": torch.arange(8) % 2,
    }
    losses = learn(model, batch, 1)[1]
    head = [p for n, p in model.wrapped.named_parameters() if n.startswith("classifier") or "pooler" in n]
    sites = model.activation_sites()
    seen = sites.observe(lambda: model(**batch).loss)
    right = torch.autograd.grad(model(**batch).loss, head)
    found = {
        id(p): g
        for p, g in zip(
            sites.parameters, sites.gradients(seen, torch.zeros(*seen.valid_NT.shape, sites.width)), strict=True
        )
    }
    for p, g in zip(head, right, strict=True):
        torch.testing.assert_close(found[id(p)], g, rtol=1e-4, atol=1e-6)
    assert learn(model, batch, 30)[1][-1] < losses[0]


# --- what cannot be ---


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (lambda: on_answers(positions="all"), {}, "positions='answer'"),
        (lambda: on_answers(trainable="all"), {}, "trainable='input'"),
        (lambda: get_adapter_model(causal("llama")[0], LoRAConfig(rank=2, positions="answer")), {}, "trainable='input'"),
        (on_answers, {"step_control": "clip"}, "step_control"),
        (on_answers, {"line_search": [0, 1]}, "line_search"),
        (on_answers, {"query_mode": "split"}, "query_mode"),
    ],
)  # fmt: skip
def test_what_queries_on_activations_need(make, options, sentence):
    with pytest.raises(ZOError, match=sentence):
        learn(make(), task_of(), 1, **options)


def test_the_model_with_the_adapters_is_asked_for():
    model = on_answers()
    with pytest.raises(ZOError, match="module"):
        MeZO(trainable_parameters(model), lr=1e-3, estimator="activations", directions="rademacher").step(
            lambda: model(**task_of()).loss
        )
    with pytest.raises(ZOError, match="independent entries"):
        MeZO(trainable_parameters(model), module=model, estimator="activations", directions="sphere")


def test_a_closure_that_runs_the_model_twice_or_never():
    model, batch = on_answers(), task_of()
    with pytest.raises(ZOError, match="2 times"):
        learn(model, batch, 1, closure=lambda b: model(**b).loss + model(**b).loss)
    with pytest.raises(ZOError, match="0 times"):
        learn(model, batch, 1, closure=lambda b: torch.zeros(()))
    assert adapted(causal("llama")[0]).answers.ended is None


def test_ranks_with_rows_of_their_own_are_refused():
    model = on_answers()
    optimizer = AdaZeta(
        trainable_parameters(model), lr=0.1, module=model, estimator="learned-feedback", directions="rademacher",
        query_mode="distributed", distributed=Distributed(share="data"),
    )  # fmt: skip
    with pytest.raises(ZOError, match=r"share='data' averages losses.*share queries"):
        optimizer.step(lambda b: model(**b).loss, batch_of("left"))
