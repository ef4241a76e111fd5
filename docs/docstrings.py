"""What docstrings look like on the site: roles become code, doctests become blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.M)  # several arguments, one description
DOCTEST = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> ).+\n?)*)+", re.M)


def to_markdown(text: str) -> str:
    """A docstring as Markdown.

    >>> to_markdown("See :class:`~zo_opt.MeZO` for <a, b>.")
    'See `MeZO` for &lt;a, b>.'
    >>> to_markdown("Args:\\n    a, b: sizes.").splitlines()
    ['Args:', '    a: sizes.', '    b: sizes.']
    >>> to_markdown(">>> 1 + 1\\n2").splitlines()
    ['```pycon', '>>> 1 + 1', '2', '```']
    """
    text = ROLE.sub(r"`\1`", text).replace("``", "`")
    text = SHARED.sub(lambda found: "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", ")), text)
    text = re.sub(r"<(?=[A-Za-z])", "&lt;", text)  # mathematics, no tag
    return DOCTEST.sub(lambda found: f"```pycon\n{found[0].strip()}\n```\n", text).rstrip("\n")


class Docstrings(griffe.Extension):
    """Applies :func:`to_markdown` to every docstring that is shown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
