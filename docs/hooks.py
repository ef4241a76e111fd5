"""What mkdocs does not do by itself: pages made from the code, pages that lie outside of docs/, links to other files, equations."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import method_pages  # noqa: E402

# Pages of the site -> files of the repository.
OUTSIDE = {
    "index.md": "README.md",
    "developing/contributing.md": "CONTRIBUTING.md",
    "developing/security.md": "SECURITY.md",
    "developing/changelog.md": "CHANGELOG.md",
}
INSIDE = {path: page for page, path in OUTSIDE.items()}
AS_TEXT = (".md", ".py")  # shown as they are
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def on_config(config: Any) -> Any:
    """The menu gets the pages that are made from the code; ``math`` blocks become MathML, which needs no script."""
    fence = {"name": "math", "class": "math", "format": lambda source, *_, **__: convert(source, display="block")}
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    for title, pages in method_pages.menu().items():
        place(config["nav"], title).extend(pages)
    return config


def place(nav: list[dict[str, Any]], title: str) -> list[Any]:
    """The list that stands under a title of the menu, at any depth."""
    for entry in nav:
        for name, value in entry.items() if isinstance(entry, dict) else ():
            if name == title:
                return value  # type: ignore[no-any-return]
            if isinstance(value, list) and (found := place(value, title)) is not None:
                return found
    return None  # type: ignore[return-value]


def on_files(files: Any, config: Any) -> Any:
    """Add what is made, what lies elsewhere, and whatever these link to."""
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    for page, text in method_pages.pages().items():
        files.append(File.generated(config, page, content=text))
    for path in (*ROOT.glob("benchmarks/**/*"), *ROOT.glob("examples/*.py"), ROOT / "CITATION.cff"):
        if path.is_file() and "__pycache__" not in path.parts:
            name = f"repository/{path.relative_to(ROOT)}"
            name += ".txt" if path.suffix in AS_TEXT else ""
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links are written as they hold in the repository; here they lead to the site's pages."""
    at = page.file.src_uri
    return re.sub(LINK, lambda link: relink(at, link[1]), markdown)


def relink(page: str, link: str) -> str:
    """A link of a page, as it holds on the site.

    >>> relink("index.md", "docs/start/ten-minutes.md"), relink("index.md", "CONTRIBUTING.md")
    ('start/ten-minutes.md', 'developing/contributing.md')
    >>> relink("methods/learning.md", "../../benchmarks/results/learning.jsonl")
    '../repository/benchmarks/results/learning.jsonl'
    >>> relink("methods/learning.md", "adapters.md")
    'adapters.md'
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(OUTSIDE.get(page, f"docs/{page}")), link))
    if path in INSIDE:
        target = INSIDE[path]
    elif path.startswith("docs/"):
        target = path.removeprefix("docs/")
    else:
        target = f"repository/{path}" + (".txt" if path.endswith(AS_TEXT) else "")
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
