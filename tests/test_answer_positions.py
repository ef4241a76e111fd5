"""Adapters that act from the answer on: the kept prompt gives what the masked forward gives, in every family and every way of use."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import IDS, SEQ2SEQ, SIZES, build, padded_batch, perturb

from zo_opt import (
    AdaZeta,
    LoRAConfig,
    TTConfig,
    TTLoRAConfig,
    get_adapter_model,
    load_adapter_model,
    trainable_parameters,
)
from zo_opt.adapters.positions import answers_of
from zo_opt.errors import ZOError
from zo_opt.schedules import constant_queries

WINDOW = {"sliding_window": 4, "num_key_value_heads": 2}
SIZED = IDS | SIZES
BIG = {"num_hidden_layers": 3}
CAUSAL = {
    "llama": (transformers.LlamaConfig, SIZED | BIG | {"num_key_value_heads": 2}, "tokens"),
    "mistral, a window": (transformers.MistralConfig, SIZED | BIG | WINDOW, "tokens"),
    "gemma2, two kinds of mask": (transformers.Gemma2Config, SIZED | BIG | WINDOW | {"head_dim": 8}, "tokens"),
    "gemma3, two kinds of mask": (transformers.Gemma3TextConfig, SIZED | BIG | WINDOW | {"head_dim": 8}, "tokens"),
    "qwen2": (transformers.Qwen2Config, SIZED | BIG | {"num_key_value_heads": 2}, "tokens"),
    "gpt2, learned positions": (transformers.GPT2Config, IDS | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}, "tokens"),
    "opt, positions of real tokens": (
        transformers.OPTConfig,
        IDS | {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64},
        "tokens",
    ),
    "bloom, alibi": (transformers.BloomConfig, IDS | {"hidden_size": 32, "n_layer": 3, "n_head": 4}, "rows"),
    "gpt-neox": (transformers.GPTNeoXConfig, SIZED | BIG, "tokens"),
}  # fmt: skip


def causal(name, implementation=None):
    kind, options, axis = CAUSAL[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(kind(**options), attn_implementation=implementation)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.2)
    return model.eval(), axis


def adapted(model, layers=2, **options):
    model = get_adapter_model(model, LoRAConfig(rank=3, layers=layers, positions="answer", **options))
    perturb(trainable_parameters(model))
    return model


def batch_of(side, answer=2, rows=3, tokens=11):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row, missing in enumerate((0, 3, 5)):
        mask[row, slice(0, missing) if side == "left" else slice(tokens - missing, tokens)] = 0
    labels = ids.clone()
    ends = torch.full((rows,), tokens) if side == "left" else mask.sum(1)
    places = torch.arange(tokens)
    labels[(places < ends[:, None] - answer) | (mask == 0)] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def masked(model, **inputs):
    """The plain forward of whole sequences, adapters masked at the prompt: what everything else is compared with."""
    answers = model.answers
    before, answers.objection = answers.objection, "for comparison"
    try:
        return model(**inputs)
    finally:
        answers.objection = before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_kept_prompt_gives_the_losses_of_the_masked_forward(name, side):
    model, axis = causal(name)
    model = adapted(model)
    batch = batch_of(side)
    found = model(**batch)
    assert model.answers.objection is None and model.answers._axis == axis
    right = masked(model, **batch)
    assert abs(float(found.loss - right.loss)) <= 1e-5
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], right.logits[real], rtol=1e-4, atol=1e-5)
    base = model.wrapped  # and it is not what adapters at every token give
    model.positions.mask_NS = None
    with model.positions.given(torch.ones_like(real)):
        assert abs(float(masked(model, **batch).loss - right.loss)) > 1e-4
    assert base is model.wrapped


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_answers_of_different_lengths_and_batches_met_before(implementation):
    model, _ = causal("llama", implementation)
    model = adapted(model)
    batch = batch_of("right")
    batch["labels"][0, 5:] = batch["input_ids"][0, 5:]  # a longer answer beside shorter ones
    for _ in range(2):  # the second time from what is kept
        assert abs(float(model(**batch).loss - masked(model, **batch).loss)) <= 1e-5
    recorded = model.answers.recorder.recorded
    model(**batch)
    assert model.answers.recorder.recorded == recorded
    with torch.no_grad():
        next(model.wrapped.model.layers[0].parameters()).mul_(1.5)  # the frozen base is another: nothing kept is used
    assert abs(float(model(**batch).loss - masked(model, **batch).loss)) <= 1e-5
    assert model.answers.recorder.recorded > recorded


def test_gradients_through_a_kept_prompt_are_those_of_the_masked_forward():
    model, _ = causal("llama")
    model = adapted(model)
    batch, parameters = batch_of("left"), trainable_parameters(model)
    found = torch.autograd.grad(model(**batch).loss, parameters)
    right = torch.autograd.grad(masked(model, **batch).loss, parameters)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2, learned positions", "bloom, alibi"])
@torch.no_grad()
def test_generate_writes_what_answers_one_token_at_a_time_say(name):
    model, _ = causal(name)
    model = adapted(model)
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(2))
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    for length in range(6, 10):  # the prompt's last token, and all that was written, are answer
        answers = torch.arange(length).expand(2, -1) >= 5
        with model.answering(answers):
            logits = masked(
                model, input_ids=written[:, :length], attention_mask=torch.ones(2, length, dtype=torch.long)
            ).logits
        assert torch.equal(logits[:, -1].argmax(-1), written[:, length])


@pytest.mark.parametrize("name", SEQ2SEQ)
@torch.no_grad()
def test_an_encoder_runs_once_a_row_and_only_the_decoder_is_adapted(name):
    model = get_adapter_model(build(name), LoRAConfig(rank=3, positions="answer"))
    perturb(trainable_parameters(model))
    assert all("decoder" in path for path in model.adapted)
    batch = padded_batch(name)
    first = model(**batch).loss
    recorded = model.encoder.recorder.recorded
    again = model(**batch).loss
    assert recorded == len(batch["input_ids"]) == model.encoder.recorder.recorded
    everywhere = model.unload()
    assert torch.equal(first, again)
    assert float(everywhere(**batch).loss - first).__abs__() > 1e-4


def beside_twin(model, ids, answers):
    """What an encoder's answers end as, row by row without padding: they see the prompt as the base left it, and themselves."""
    body, heads = model.base_model, SIZES["num_attention_heads"]
    with model.positions.sleep():
        below = body(input_ids=ids, output_hidden_states=True).hidden_states

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(-3, -2)

    state = below[0][answers][None]
    for layer, hidden in zip(body.encoder.layer, below, strict=False):
        attention = layer.attention.self
        with model.positions.sleep():
            keys, values = (split(f(hidden[~answers][None])) for f in (attention.key, attention.value))
        keys = torch.cat([keys, split(attention.key(state))], 2)
        values = torch.cat([values, split(attention.value(state))], 2)
        seen = torch.nn.functional.scaled_dot_product_attention(split(attention.query(state)), keys, values)
        state = layer.attention.output(seen.transpose(1, 2).flatten(2), state)
        state = layer.output(layer.intermediate(state), state)
    return state[0]


def encoder_rows(name, kind=LoRAConfig, **options):
    model = get_adapter_model(build(name), kind(rank=3, positions="answer", answer_token=7, **options))
    perturb(trainable_parameters(model))
    ids = torch.randint(8, 50, (3, 9), generator=torch.Generator().manual_seed(3))
    real = torch.ones_like(ids)
    ids[2, 6:] = real[2, 6:] = 0
    ids[0, 4] = ids[0, 5] = ids[1, 6] = ids[2, 0] = 7
    return model, ids, real


@pytest.mark.parametrize("name", ["bert", "roberta"])
@torch.no_grad()
def test_in_an_encoder_answers_see_the_prompt_as_the_base_left_it(name):
    model, ids, real = encoder_rows(name)
    found = model.base_model(input_ids=ids, attention_mask=real).last_hidden_state
    for row, length in enumerate(real.sum(1).tolist()):
        alone = ids[row : row + 1, :length]
        answers = alone == 7
        torch.testing.assert_close(
            found[row, :length][answers[0]], beside_twin(model, alone, answers), rtol=1e-5, atol=1e-5
        )
        with model.positions.sleep():
            plain = model.base_model(input_ids=alone).last_hidden_state
        torch.testing.assert_close(found[row, :length][~answers[0]], plain[0, ~answers[0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta"])
@torch.no_grad()
def test_copies_beside_a_row_are_each_shifted_by_its_own(name):
    model, ids, real = encoder_rows(name, TTLoRAConfig, layers=1, trainable="input")
    sites = model.activation_sites()

    def call():
        return model(input_ids=ids, attention_mask=real).logits.sum()

    shifts = torch.randn(3, 3, 2, sites.width, generator=torch.Generator().manual_seed(1))
    together = sites.ends(call, shifts)
    alone = torch.cat([sites.ends(call, shift[None]) for shift in shifts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2
    seen = sites.observe(call)
    assert seen.tokens(5) == int(real.sum()) + 5 * 4


def test_copies_of_weights_in_one_forward_have_answers_beside_their_rows_too():
    losses = {}
    for mode in ("sequential", "batched"):
        model = get_adapter_model(build("bert"), LoRAConfig(rank=3, positions="answer"))
        optimizer = AdaZeta(
            trainable_parameters(model),
            lr=1e-2,
            zo_eps=1e-2,
            module=model,
            query_mode=mode,
            query_schedule=constant_queries(4),
        )
        losses[mode] = [float(optimizer.step(lambda b, m=model: m(**b).loss, padded_batch("bert"))) for _ in range(3)]
    assert losses["batched"] == pytest.approx(losses["sequential"], abs=1e-5)


@torch.no_grad()
def test_rows_without_an_answer_are_the_bases():
    model, ids, real = encoder_rows("bert")
    found = model.base_model(input_ids=ids.masked_fill(ids == 7, 9), attention_mask=real).last_hidden_state
    with model.positions.sleep():
        plain = model.base_model(input_ids=ids.masked_fill(ids == 7, 9), attention_mask=real).last_hidden_state
    torch.testing.assert_close(found[real == 1], plain[real == 1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_in_an_encoder_that_takes_no_copies_adapters_act_at_the_masks():
    model, ids, real = encoder_rows("deberta-v2")
    seen = []
    first = model.adapted_modules()[model.adapted[0]]
    handle = first.register_forward_hook(
        lambda m, args, out: seen.append((out - m.base_layer(args[0])).abs().sum(-1) > 0)
    )
    model.base_model(input_ids=ids, attention_mask=real)
    handle.remove()
    assert seen[-1].nonzero().tolist() == [[0, 4], [0, 5], [1, 6], [2, 0]]


@torch.no_grad()
def test_positions_are_saved_and_are_no_weight(tmp_path):
    model, _ = causal("llama")
    model = adapted(model)
    batch = batch_of("left")
    loss = model(**batch).loss
    model.save_pretrained(tmp_path)
    with pytest.raises(ZOError, match="positions='all'"):
        model.merge_and_unload()
    with pytest.raises(ZOError, match="positions='all'"):
        model.export_peft(tmp_path / "peft")
    base = model.unload()
    assert "forward" not in vars(base.model)  # the plain model, to its methods
    again = load_adapter_model(base, tmp_path)
    assert again.adapter_config.positions == "answer"
    assert torch.equal(again(**batch).loss, loss)


def test_what_acts_on_every_token_cannot_act_on_answers():
    from zo_opt.adapters import FullConfig

    with pytest.raises(ZOError, match="leave positions out"):
        get_adapter_model(causal("llama")[0], FullConfig(positions="answer"))


@torch.no_grad()
def test_a_serial_adapter_on_answers_leaves_the_prompt_alone():
    model, _ = causal("llama")
    model = get_adapter_model(
        model, TTConfig(rank=2, bottleneck=8, layers=2, positions="answer", target_modules=["down_proj", "gate_proj"])
    )
    perturb(trainable_parameters(model))
    batch = batch_of("left")
    assert abs(float(model(**batch).loss - masked(model, **batch).loss)) <= 1e-5


def test_what_is_trained_before_the_answer_keeps_the_prompt_from_being_kept():
    model, _ = causal("llama")
    model = get_adapter_model(model, LoRAConfig(rank=2, layers=1, positions="answer", modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        model(**batch_of("left"))
    assert "embed_tokens is trained" in model.answers.objection


def test_answer_positions_of_labels():
    labels = torch.tensor([[-100, -100, 4, -100, 5], [3, 4, 5, 6, 7]])
    assert answers_of(labels, "causal").int().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert answers_of(labels, "encoder").int().tolist() == [[0, 0, 1, 0, 1], [1, 1, 1, 1, 1]]


@torch.no_grad()
def test_output_sides_at_singular_vectors_start_at_zero():
    model, _ = causal("llama")
    model = get_adapter_model(
        model, TTLoRAConfig(rank=4, tt_rank=8, alpha=4, trainable="input", target_modules=["o_proj"])
    )
    for module in model.adapted_modules().values():
        up = module.adapter.up.dense()  # (rank, out)
        u = torch.linalg.svd(module.base_layer.weight)[0][:, :4]
        torch.testing.assert_close(up.T @ up, u @ u.T, rtol=1e-4, atol=1e-5)
        assert not module.adapter.dense().any()
        assert all(not p.requires_grad for p in module.adapter.up.parameters())
