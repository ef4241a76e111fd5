"""Text from a tuned model: prompts as they were in training, and transformers' own ``generate`` after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, get_args

import torch

from zo_opt.errors import ZOError, reason_of
from zo_opt.models.probes import rounding
from zo_opt.system.plain_json import is_number
from zo_opt.tasks.chat import asked_of, said_in
from zo_opt.tasks.metrics import GENERATION, LANGUAGE_MODELLING
from zo_opt.tasks.rows import make_prompts
from zo_opt.tasks.scoring import ChatGenerator, Scorer, Writer
from zo_opt.tasks.scoring.base import context_length
from zo_opt.tasks.scoring.chat import chat_ids
from zo_opt.tasks.scoring.texts import end_tokens

Form = Literal["run", "chat", "plain"]
FORMS = get_args(Form)
Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
MAX_NEW_TOKENS = 64  # where the task says nothing
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
_POSSIBLE: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_new_tokens": (lambda n: n >= 1, "a whole number of at least 1"),
    "temperature": (lambda t: t > 0, "a number above 0"),
    "top_p": (lambda p: 0 < p <= 1, "a share above 0 and up to 1"),  # transformers takes others without a word
    "top_k": (lambda k: k >= 1, "a whole number of at least 1"),
}


def check_writes(scorer: Scorer, model: Any) -> None:
    """Whether the model writes at all.

    Raises:
        ZOError: it has a head for labels or masks alone.
    """
    if not isinstance(scorer, Writer) and not model.can_generate():
        raise ZOError(
            f"{type(getattr(model, 'wrapped', model)).__name__} cannot write text; generate needs a run on a causal or "
            "encoder-decoder model."
        )


def prompt_tokens(scorer: Scorer, prompt: Prompt, form: Form, where: str) -> list[int]:
    """The tokens that a model is given to go on from.

    Args:
        scorer: of the run.
        prompt: a text, a row or a conversation.
        form: as in ``Run.generate``.
        where: what the prompt is called in sentences.

    Raises:
        ZOError: the prompt is of another kind, or lacks a column; or there is no chat template.
    """
    if form not in FORMS:
        raise ZOError(f"form={form!r} is not known; choose one of {', '.join(FORMS)}.")
    if not isinstance(prompt, str | Mapping | Sequence):
        raise ZOError(f"{where} is of type {type(prompt).__name__}; give a text, a row, or a list of messages.")
    if ids := _tokens(scorer, prompt, form, where):
        return ids
    raise ZOError(f"{where} is empty, and this tokenizer begins no text of its own; give a text.")


def _tokens(scorer: Scorer, prompt: Prompt, form: Form, where: str) -> list[int]:
    task = scorer.task
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return chat_tokens(scorer, prompt, where)
    if form == "run" and isinstance(scorer, ChatGenerator):
        asked: Mapping[str, Any] = {task.conversation[0]: _said(prompt)} if isinstance(prompt, str) else prompt
        return scorer.chat_prompt(asked_of(asked, task.conversation, where), where)
    if form == "chat":
        return chat_tokens(scorer, _said(_text(prompt, form, where)), where)
    if form == "plain":
        return scorer.opening(_text(prompt, form, where))
    if task.kind == LANGUAGE_MODELLING:
        return scorer.opening(scorer.markup.as_letters(_text(prompt, form, where)))
    row = prompt
    if isinstance(prompt, str):
        columns = list(dict.fromkeys(task.shown_columns()))
        if len(columns) != 1:
            raise ZOError(
                f"{where} is one text, and the run's prompt shows the columns {', '.join(columns)}; give rows with these columns, or --form plain."
            )
        row = {columns[0]: prompt}
    [example] = make_prompts([dict(row)], task, where)  # type: ignore[arg-type]
    encoded = scorer.encode(example)
    return scorer.prompt(encoded) if isinstance(scorer, Writer) else encoded.prompts[0]


def chat_tokens(scorer: Scorer, messages: Sequence[Mapping[str, Any]], where: str) -> list[int]:
    """A conversation in the tokenizer's chat template, up to where the assistant is to speak.

    Raises:
        ZOError: the tokenizer has no chat template, or it does not take these messages.
    """
    if not getattr(scorer.tokenizer, "chat_template", None):
        raise ZOError("this model's tokenizer has no chat template; give --form run or plain.")
    return chat_ids(scorer, said_in(messages, where), where)


def options_of(
    model: Any, scorer: Scorer, prompts: Sequence[Sequence[int]], *, batch_size: int = 1, seed: int = 0, **options: Any
) -> list[dict[str, Any]]:
    """The options of ``generate`` for each prompt, those that were left open filled in.

    Args:
        model: a model of transformers, with adapters or without.
        scorer: of the run.
        prompts: token ids of each.
        batch_size: prompts at once.
        seed: of sampling.
        **options: of ``generate``; what is not given is the checkpoint's own.

    Raises:
        ZOError: a prompt and its new tokens do not fit the context; or an option is not possible or has no effect.
    """
    plain, draws = getattr(model, "wrapped", model), samples(model, options)
    if batch_size > 1 and draws:
        raise ZOError(
            "batch_size was given with do_sample, whose draws are each prompt's own; leave one out, and prompts are written one at a time."
        )
    if not draws:
        given = [name for name in _OF_SAMPLING if options.get(name) is not None] + (["seed"] if seed else [])
        if given:
            raise ZOError(
                f"{given[0]} was given without do_sample, of which it is a part; add --do_sample, or leave it out."
            )
    for name, value in options.items():
        if name in _POSSIBLE and not (is_number(value) and _POSSIBLE[name][0](value)):
            raise ZOError(f"{name}={value!r} is not possible; give {_POSSIBLE[name][1]}.")
    return [_with_length(plain, scorer, prompt, options) for prompt in prompts]


@torch.no_grad()
def write(
    model: Any,
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 1,
    seed: int = 0,
    streamer: Any = None,
) -> Iterator[tuple[int, list[int]]]:
    """The number of each prompt and the new tokens after it, by transformers' own ``generate``, as they are written.

    Prompts of like length share a batch; where padding changes what the model makes of a prompt, those of one length alone.

    Args:
        model: a model of transformers, with adapters or without.
        scorer: of the run.
        prompts: token ids of each.
        options: of each, as :func:`options_of` gives them.
        batch_size: prompts at once.
        seed: of sampling, of each prompt anew; drawn beside the global random state.
        streamer: as in transformers; of one prompt at a time.

    Raises:
        ZOError: transformers does not take an option.
    """
    plain = getattr(model, "wrapped", model)  # adapters are inside
    for indices in _batches(plain, scorer, prompts, [o["max_new_tokens"] for o in options], batch_size):
        given = _inputs(plain, scorer, [prompts[i] for i in indices])
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            if plain.device.type == "cuda":
                torch.cuda.manual_seed(seed)
            try:
                written = plain.generate(**given, streamer=streamer, **options[indices[0]])
            except (ValueError, TypeError) as error:
                raise ZOError(f"transformers does not generate with these options ({reason_of(error)}).") from error
        new = written if plain.config.is_encoder_decoder else written[:, given["input_ids"].shape[1] :]
        yield from zip(indices, (_ended(row, scorer, plain) for row in new.tolist()), strict=True)


def samples(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether tokens are drawn."""
    asked = options.get("do_sample")
    return bool(getattr(model, "wrapped", model).generation_config.do_sample if asked is None else asked)


def _with_length(plain: Any, scorer: Scorer, prompt: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with what was left open: how much is written after this prompt, and what ends it."""
    task, decodes = scorer.task, bool(plain.config.is_encoder_decoder)
    context = context_length(plain, scorer.tokenizer, None, scorer.probed.positions)
    most = task.max_new_tokens if task.kind == GENERATION else MAX_NEW_TOKENS
    most = max(1, min(most, context if decodes else context - len(prompt)))  # where nobody said how many
    found: dict[str, Any] = {"max_new_tokens": most, "pad_token_id": scorer.pad_id, **options}
    if plain.generation_config.eos_token_id is None:  # it learned to end so
        found = {"eos_token_id": scorer.tokenizer.eos_token_id} | found
    needed = max(len(prompt), found["max_new_tokens"]) if decodes else len(prompt) + found["max_new_tokens"]
    if needed > context:
        raise ZOError(
            f"a prompt of {len(prompt)} tokens with {found['max_new_tokens']} new ones is longer than the context of {context}; shorten it, "
            "or lower --max_new_tokens."
        )
    return found


def _batches(
    plain: Any, scorer: Scorer, prompts: Sequence[Sequence[int]], most: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """Prompts that are written together: as long as each other, or nearly so, and with as many new tokens at most."""
    if batch_size == 1:
        yield from ([i] for i in range(len(prompts)))
        return
    alike = not _bears_padding(plain, scorer, prompts)
    order = sorted(range(len(prompts)), key=lambda i: (most[i], len(prompts[i])))
    for _, group in groupby(order, lambda i: (most[i], len(prompts[i]) if alike else 0)):
        members = list(group)
        yield from (members[i : i + batch_size] for i in range(0, len(members), batch_size))


def _bears_padding(plain: Any, scorer: Scorer, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the first new token's logits are the same where the prompt is padded beside a longer one: tried on the shortest prompt."""
    short, long = min(prompts, key=len), max(prompts, key=len)
    if len(short) == len(long):
        return True
    once = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = []
    for rows in ([short], [short, long]):
        written = plain.generate(**_inputs(plain, scorer, rows), pad_token_id=scorer.pad_id, num_beams=1, **once)
        found.append(written.logits[0][0].float())
    alone, beside = found
    return bool((alone - beside).abs().max() <= rounding(plain) * alone.abs().max().clamp(min=1e-3))


def _inputs(plain: Any, scorer: Scorer, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Prompts as tensors, padded on the side that this kind of model takes."""
    ids = scorer.padded([[list(p) for p in prompts]], scorer.pad_id)[0]
    mask = scorer.padded([[[1] * len(p) for p in prompts]], 0)[0]
    return {"input_ids": ids.to(plain.device), "attention_mask": mask.to(plain.device)}


def _ended(new: list[int], scorer: Scorer, plain: Any) -> list[int]:
    """New tokens up to the one that ends them: in a batch padding follows."""
    ends, first = end_tokens(scorer.tokenizer, plain.generation_config), int(plain.config.is_encoder_decoder)
    last = next((i for i, token in enumerate(new) if token in ends and i >= first), len(new))
    return new[: last + 1]


def _said(text: str) -> list[dict[str, str]]:
    """A conversation that begins with what a user says."""
    return [{"role": "user", "content": text}]


def _text(prompt: Any, form: str, where: str) -> str:
    if isinstance(prompt, str):
        return prompt
    raise ZOError(f"{where} is a row with columns, of which form={form!r} makes no use; give a text, or --form run.")
