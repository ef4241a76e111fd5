"""Conversations: rows with ``messages``, or with ``prompt`` and ``completion``, as turns of which some are learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zo_opt.errors import ZOError
from zo_opt.tasks.cells import text_of
from zo_opt.tasks.metrics import GENERATION
from zo_opt.tasks.tasks import Task

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT)


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: system, user or assistant.
        content: the text.
        learned: whether it is what the model is to say.
    """

    role: str
    content: str
    learned: bool = False


def chat_task(columns: Iterable[str]) -> Task | None:
    """The task of a table whose columns hold conversations; None where they do not.

    >>> chat_task(["id", "messages"]).conversation, chat_task(["completion", "prompt"]).conversation, chat_task(["text", "label"])
    (('messages',), ('prompt', 'completion'), None)
    """
    found = set(columns)
    for conversation in ((MESSAGES,), (PROMPT, COMPLETION)):
        if found.issuperset(conversation):
            return Task(
                "chat", f"{{{conversation[0]}}}", kind=GENERATION, target_column=conversation[-1], max_new_tokens=64,
                conversation=conversation,
            )  # fmt: skip
    return None


def turns_of(row: Mapping[str, Any], conversation: tuple[str, ...], where: str) -> tuple[Turn, ...]:
    """The turns of a row: of ``messages`` every answer is learned, of ``prompt`` and ``completion`` the completion.

    Raises:
        ZOError: a message has no role or no text; or nothing is to be learned.
    """
    if conversation == (MESSAGES,):
        turns = _messages(row[MESSAGES], MESSAGES, where, learned=True)
    else:
        turns = _side(row[PROMPT], PROMPT, "user", where) + _side(row[COMPLETION], COMPLETION, ASSISTANT, where)
    if not any(turn.learned for turn in turns[1:]):
        raise ZOError(
            f"{where}: column {conversation[-1]!r} holds no answer of the assistant; add one, or remove the row."
        )
    return turns


def asked_of(row: Mapping[str, Any], conversation: tuple[str, ...], where: str) -> list[dict[str, str]]:
    """The messages of a row up to where the assistant is to speak: an answer that stands there last is left out.

    Raises:
        ZOError: the row has no such column, or what it holds is no conversation.
    """
    column = conversation[0]
    if column not in row:
        raise ZOError(f"{where}: there is no column {column!r}; its columns are {', '.join(map(str, row))}.")
    if column == PROMPT:
        return messages_of(_side(row[PROMPT], PROMPT, "user", where))
    turns = _messages(row[MESSAGES], MESSAGES, where, learned=False)
    asked = turns[:-1] if turns[-1].role == ASSISTANT else turns
    if not asked:
        raise ZOError(f"{where}: column {column!r} holds an answer to nothing; give what was said before it.")
    return messages_of(asked)


def said_in(messages: Any, where: str) -> list[dict[str, str]]:
    """A conversation given as it is, checked as one of a row.

    Raises:
        ZOError: it is none.
    """
    return messages_of(_messages(messages, MESSAGES, where, learned=False))


def messages_of(turns: Iterable[Turn]) -> list[dict[str, str]]:
    """As chat templates take them."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _side(value: Any, column: str, role: str, where: str) -> tuple[Turn, ...]:
    """A prompt or a completion: a text, or messages."""
    learned = role == ASSISTANT
    if isinstance(value, list | tuple):
        return _messages(value, column, where, learned=learned)
    return (Turn(role, text_of(value, column, where), learned),)


def _messages(value: Any, column: str, where: str, *, learned: bool) -> tuple[Turn, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(m, Mapping) for m in value):
        raise ZOError(
            f"{where}: column {column!r} holds {ascii(value)[:60]} and no list of messages, each with role and content; give such a list, or "
            "rename the column."
        )
    turns = []
    for number, message in enumerate(value, start=1):
        place = f"{where}, message {number}"
        role = message.get("role")
        if role not in ROLES:
            raise ZOError(f"{place}: role {role!r} is not known; give one of {', '.join(ROLES)}.")
        if message.get("tool_calls") or message.get("function_call"):
            raise ZOError(f"{place}: it calls tools, which is not learned; remove the row.")
        answers = role == ASSISTANT and message.get("weight") != 0  # 0: said, and not to be learned
        turns.append(Turn(role, text_of(message.get("content"), "content", place), learned and answers))
    return tuple(turns)
