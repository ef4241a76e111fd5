"""Answers in a conversation, each learned after all that was said before it, in the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zo_opt.errors import ZOError, reason_of
from zo_opt.tasks.chat import MESSAGES, Turn, messages_of
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring.base import Encoded, Scorer
from zo_opt.tasks.scoring.causal import CausalText
from zo_opt.tasks.scoring.texts import end_tokens
from zo_opt.tasks.tasks import Task


class ChatGenerator(CausalText):
    """Each answer that is learned is a row of its own: its prompt is what ``generate`` gives the model, its target the answer and the token
    that ends it.

    [choice] So the loss is of the assistant's words alone, and adapters on answers act where they act in generation. Prompt and completion
    as texts stand as they are where the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, task: Task, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer, task, max_length)
        self._in_template = bool(getattr(tokenizer, "chat_template", None))
        if not self._in_template and task.conversation == (MESSAGES,):
            raise ZOError(
                "the rows hold messages, and this model's tokenizer has no chat template; give an instruct model, or rows with prompt and "
                "completion as texts."
            )
        self._ends = end_tokens(tokenizer, getattr(model, "generation_config", None))

    def encode(self, example: Example) -> Encoded:
        """The last answer of a conversation."""
        return self.encode_all([example])[-1]

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded]:
        return [
            self._encode(e.turns[:i], turn, e.where)
            for e in examples
            for i, turn in enumerate(e.turns)
            if turn.learned and i > 0
        ]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]], where: str) -> list[int]:
        """The tokens of a conversation up to where the assistant is to speak."""
        if not self._in_template:
            return self.opening("".join(self.markup.as_letters(m["content"]) for m in messages))
        return chat_ids(self, messages, where)

    def _encode(self, before: Sequence[Turn], answer: Turn, where: str) -> Encoded:
        turns = [replace(turn, content=self.markup.as_letters(turn.content)) for turn in (*before, answer)]
        prompt, whole = self._tokens(turns, where) if self._in_template else self._plain_tokens(turns)
        most = max(self.max_length // 2, 1)
        target = whole[:most]
        room = self.max_length - max(len(target), min(self.task.max_new_tokens, most))
        kept = prompt[-room:] if room > 0 else prompt[-1:]
        return Encoded(
            [kept + target], [target], truncated=kept != prompt, shortened=target != whole, references=(answer.content,)
        )

    def _tokens(self, turns: Sequence[Turn], where: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt and of the answer with its end, in the chat template."""
        messages = messages_of(turns)
        asked = rendered(self.tokenizer, messages[:-1], where, answers=True)
        said = rendered(self.tokenizer, messages, where, answers=False)
        if not said.startswith(asked):
            raise ZOError(
                f"{where}: this tokenizer's chat template does not write an answer where it asks for one, so that it cannot be learned there; "
                "give rows with prompt and completion as texts under another model."
            )
        prompt, target = self.continued(asked, said)
        end = next((i for i, token in enumerate(target) if token in self._ends), None)
        if end is not None:  # a template may go on with a line end
            return prompt, target[: end + 1]
        return prompt, target + self.end

    def _plain_tokens(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        *before, answer = (turn.content for turn in turns)
        text = "".join(before)
        return self.opening(text), self.continued(text, text + answer)[1] + self.end


def chat_ids(scorer: Scorer, messages: Sequence[Mapping[str, Any]], where: str) -> list[int]:
    """The tokens of a conversation in the chat template, up to where the assistant is to speak.

    Markup is the template's alone: in what is said it is letters, as in training.
    """
    said = [{name: _letters(scorer, value) for name, value in message.items()} for message in messages]
    text = rendered(scorer.tokenizer, said, where, answers=True)
    return scorer.tokens_of(text, special=False)  # the template has them in it


def _letters(scorer: Scorer, value: Any) -> Any:
    return scorer.markup.as_letters(value) if isinstance(value, str) else value


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, *, answers: bool) -> str:
    """A conversation in a tokenizer's chat template; ``answers``: up to where the assistant is to speak.

    Raises:
        ZOError: the template does not take these messages.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=answers, tokenize=False))
    except Exception as error:  # templates raise what they like
        raise ZOError(
            f"{where} does not fit the tokenizer's chat template ({reason_of(error)}); change the order of its messages, or remove it."
        ) from error
