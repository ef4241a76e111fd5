"""What is markup and what is letters in a prompt, and whether a space stands before an answer.

A tokenizer reads its special tokens (``</s>``, ``[SEP]``) wherever they stand. In a template they are meant; in a row's text they are letters.
"""

from __future__ import annotations

import re
import unicodedata
from string import Formatter
from typing import Any

_OPENING = "([{<\u201c\u2018\u00ab\u2039\u00bf\u00a1"


class Markup:
    """The special tokens of a tokenizer.

    Args:
        tokenizer: of transformers, fast or slow.
    """

    def __init__(self, tokenizer: Any) -> None:
        tokens = {str(token): False for token in tokenizer.all_special_tokens}
        for added in tokenizer.added_tokens_decoder.values():
            if added.special:  # normalised ones are found in other cases, too
                tokens[added.content] = added.normalized
        found = [
            f"(?i:{re.escape(token)})" if any_case else re.escape(token)
            for token, any_case in sorted(tokens.items(), key=lambda item: -len(item[0]))
            if token.strip()
        ]
        self._pattern = re.compile("|".join(found)) if found else None

    def as_letters(self, text: str) -> str:
        """A row's text in which the tokenizer finds no special token: behind the first letter of each stands a space (of one letter: another).

        >>> from types import SimpleNamespace as Of
        >>> Markup(Of(all_special_tokens=["</s>"], added_tokens_decoder={})).as_letters("good </s> day")
        'good < /s> day'
        """
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}" if len(found[0]) > 1 else "\ufffd", text)

    def ends(self, text: str) -> bool:
        """Whether a text ends in a special token."""
        return self._pattern is not None and any(found.end() == len(text) for found in self._pattern.finditer(text))


def preceding(template: str, name: str | None = None) -> tuple[str, bool]:
    """A template's own letters before a placeholder (its first of that name), or at its end; and whether a row's text precedes them.

    >>> preceding("{text} It was"), preceding("{mask} {{news}}: {text}", "mask"), preceding("{text}: {{a}} {mask}.", "mask")
    ((' It was', True), ('', False), (': {a} ', True))
    """
    letters, after_field = "", False
    for literal, found, _, _ in Formatter().parse(template):
        letters += literal
        if found is not None and found == name:
            break
        if found is not None:
            letters, after_field = "", True
    return letters, after_field


def space_before(text: str) -> str:
    """The space that a word takes which follows a text.

    None stands behind white space, an opening bracket or quotation mark, a script without spaces, or nothing.

    >>> [space_before(text) for text in ("It was", "Label:", "Label: ", 'It was "', "He said (", "very \\"good\\"", "")]
    [' ', ' ', '', '', '', ' ', '']
    """
    if not text or text[-1].isspace() or text[-1] in _OPENING or unicodedata.east_asian_width(text[-1]) in "WF":
        return ""
    if text[-1] in "\"'":
        return "" if text[-2:-1].isspace() or text[-2:-1] in ("", *_OPENING) else " "
    return " "
