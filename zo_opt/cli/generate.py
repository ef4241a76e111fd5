"""``zo-opt generate``."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from zo_opt.cli.lines import Lines
from zo_opt.cli.say import reporter_of
from zo_opt.errors import ZOError
from zo_opt.record.progress import Reporter
from zo_opt.tasks.rows import read_rows
from zo_opt.training.run import Run
from zo_opt.training.writing import Prompt

_OPTIONS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "seed")


def run(options: Namespace, command: str) -> None:
    """Write after a prompt, after each row of a file, or in a conversation."""
    if (options.prompt is not None) + (options.file is not None) + options.chat != 1:
        raise ZOError("generate needs one of --prompt TEXT, --file FILE and --chat.")
    if options.chat and (options.out is not None or options.form != "run" or options.json):
        raise ZOError(
            "--out, --form and --json are of no use to --chat, which is a conversation in the chat template; leave them out."
        )
    if options.out is not None and options.json:
        raise ZOError("--out and --json were both given: the lines go to one place; leave one out.")
    if options.batch_size is not None and options.out is None and not options.json:
        raise ZOError(
            "batch_size is of no use without --out or --json: on the terminal texts appear one at a time; leave it out."
        )
    reporter, as_json = reporter_of(options, beside=True)
    prompts: Sequence[Prompt] = [options.prompt] if options.file is None else read_rows(options.file)
    if options.file is not None and (options.file.suffix == ".txt" or options.form != "run"):
        prompts = [_text_of(row, options) for row in prompts if isinstance(row, Mapping)]
    given = {name: value for name in _OPTIONS if (value := getattr(options, name)) is not None}
    with closing(Lines(options.out)) as lines:
        found = Run(
            options.run_dir, device=options.device, trust_remote_code=options.trust_remote_code, reporter=reporter
        )
        if options.chat:
            _converse(found, reporter, given)
        elif options.out is None and not as_json:
            found.generate(prompts, form=options.form, streamer=_streamer(found), **given)
        else:
            texts = found.texts(prompts, form=options.form, batch_size=options.batch_size, **given)
            with reporter.track("writing", len(prompts), "prompts") as tracker:
                for number, text in enumerate(texts, start=1):
                    lines.write({"row": number, "text": text})
                    tracker.advance(1)
    if options.out is not None:
        reporter.say(f"{len(prompts):,} texts are in {options.out}")


def _text_of(row: Mapping[str, Any], options: Namespace) -> Prompt:
    """The one text of a row that no template shows."""
    if isinstance(messages := row.get("messages"), list):
        return messages
    texts = [row[name] for name in ("text", "prompt") if isinstance(row.get(name), str)]
    if len(texts) != 1:
        raise ZOError(
            f"{options.file} has rows without a column text, prompt or messages, one of which --form {options.form} takes; rename it, or give "
            "--form run."
        )
    return str(texts[0])


def _streamer(found: Run) -> Any:
    """Prints what is written as it comes."""
    from transformers import TextStreamer

    return TextStreamer(found.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _converse(found: Run, reporter: Reporter, given: Mapping[str, Any]) -> None:
    """Lines from the terminal, each answered, with all that was said before; the end of input ends it."""
    messages: list[dict[str, str]] = []
    if sys.stdin.isatty():
        reporter.say("say something; an empty line or Ctrl-D ends the conversation")
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not said:
            return
        messages.append({"role": "user", "content": said})
        [text] = found.generate([messages], streamer=_streamer(found), **given)
        messages.append({"role": "assistant", "content": text.strip()})
