"""``zo-opt merge``."""

from __future__ import annotations

from argparse import Namespace

import torch

from zo_opt.adapters.peft_write import exportable
from zo_opt.adapters.storage import load
from zo_opt.cli.say import print_json, reporter_of
from zo_opt.errors import ZOError
from zo_opt.models.quantisation import adopt, quantised_layers
from zo_opt.record.output import RUN_NAME, output_directory
from zo_opt.training.run_record import config_of, load_plain_base, load_tuned, read_record

FORMS = ("model", "lora")


def run(options: Namespace, command: str) -> None:
    """Write what a run tuned as a plain model, or its adapter in PEFT's format."""
    form = getattr(options, "as")
    if options.to is None:
        raise ZOError("merge needs --to, a new directory for the model.")
    if form not in FORMS:
        raise ZOError(f"--as {form} is not known; choose one of {', '.join(FORMS)}.")
    record = read_record(options.run_dir)
    config = config_of(record, options.run_dir / RUN_NAME, trust_remote_code=options.trust_remote_code)
    adapter = load(options.run_dir).config
    if form == "model" and adapter is not None:
        adapter.check_mergeable()
    reporter, as_json = reporter_of(options)
    with output_directory(options.to, "--to") as to:
        base, tokenizer = load_plain_base(config, record.get("resolved", {}), reporter)
        adopt(base, torch.float32)
        if form == "model" and next(quantised_layers(base), None) is not None:
            raise ZOError(
                f"model {config.model_name_or_path!r} is quantised, and merging needs its weights in full; keep the adapter as it is"
                + (", or give --as lora." if exportable(load_tuned(base, options.run_dir, reporter)) else ".")
            )
        model = load_tuned(base, options.run_dir, reporter)
        if form == "lora":
            model.export_peft(to)
        else:
            model.merge_and_unload().save_pretrained(to)  # type: ignore[operator]
            tokenizer.save_pretrained(to)
    reporter.say(f"the {'LoRA' if form == 'lora' else 'merged model'} of {options.run_dir} is in {options.to}")
    if as_json:
        print_json({"run": options.run_dir, "to": options.to, "as": form})
