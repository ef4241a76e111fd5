"""Text from a tuned model: prompts as they were in training, and transformers' own ``generate`` after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from zo_opt.errors import ZOError, reason_of
from zo_opt.system.plain_json import is_number
from zo_opt.tasks.chat import asked_of
from zo_opt.tasks.metrics import GENERATION, LANGUAGE_MODELLING
from zo_opt.tasks.rows import make_prompts
from zo_opt.tasks.scoring import ChatGenerator, Scorer, Writer
from zo_opt.tasks.scoring.base import context_length
from zo_opt.tasks.scoring.chat import chat_ids

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
    task = scorer.task
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return chat_tokens(scorer, prompt, where)
    if form == "run" and isinstance(scorer, ChatGenerator):
        messages = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else asked_of(prompt, task.conversation, where)
        )
        return scorer.chat_prompt(messages, where)
    if form == "chat":
        return chat_tokens(scorer, [{"role": "user", "content": _text(prompt, form, where)}], where)
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
    return chat_ids(scorer, messages, where)


@torch.no_grad()
def write(
    model: Any, scorer: Scorer, prompt: Sequence[int], *, seed: int = 0, streamer: Any = None, **options: Any
) -> list[int]:
    """The new tokens after one prompt, by transformers' own ``generate``.

    Args:
        model: a model of transformers, with adapters or without.
        scorer: of the run.
        prompt: token ids.
        seed: of sampling; drawn beside the global random state.
        streamer: as in transformers.
        **options: of ``generate``; what is not given is the checkpoint's own.

    Raises:
        ZOError: prompt and new tokens do not fit the context; or an option is not possible or has no effect.
    """
    plain = getattr(model, "wrapped", model)  # adapters are inside
    own, task, tokenizer = plain.generation_config, scorer.task, scorer.tokenizer
    if not options.get("do_sample", own.do_sample):
        given = [name for name in _OF_SAMPLING if options.get(name) is not None] + (["seed"] if seed else [])
        if given:
            raise ZOError(
                f"{given[0]} was given without do_sample, of which it is a part; add --do_sample, or leave it out."
            )
    for name, value in options.items():
        if name in _POSSIBLE and not (is_number(value) and _POSSIBLE[name][0](value)):
            raise ZOError(f"{name}={value!r} is not possible; give {_POSSIBLE[name][1]}.")
    decodes = bool(plain.config.is_encoder_decoder)
    context = context_length(plain, tokenizer, None, scorer.probed.positions)
    most = task.max_new_tokens if task.kind == GENERATION else MAX_NEW_TOKENS
    most = max(1, min(most, context if decodes else context - len(prompt)))  # where nobody said how many
    options = {"max_new_tokens": most, "pad_token_id": scorer.pad_id} | options
    if own.eos_token_id is None:  # it learned to end so
        options = {"eos_token_id": tokenizer.eos_token_id} | options
    needed = max(len(prompt), options["max_new_tokens"]) if decodes else len(prompt) + options["max_new_tokens"]
    if needed > context:
        raise ZOError(
            f"a prompt of {len(prompt)} tokens with {options['max_new_tokens']} new ones is longer than the context of {context}; shorten it, "
            "or lower --max_new_tokens."
        )
    ids = torch.tensor([list(prompt)], device=plain.device)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        if plain.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        try:
            written = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)
        except (ValueError, TypeError) as error:
            raise ZOError(f"transformers does not generate with these options ({reason_of(error)}).") from error
    new: list[int] = written[0, 0 if decodes else len(prompt) :].tolist()
    return new


def _text(prompt: Any, form: str, where: str) -> str:
    if isinstance(prompt, str):
        return prompt
    raise ZOError(f"{where} is a row with columns, of which form={form!r} makes no use; give a text, or --form run.")
