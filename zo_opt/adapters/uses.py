"""What can be done with a tuned model later: merged, loaded by PEFT, run elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zo_opt.adapters.model import AdapterModel
from zo_opt.adapters.modules import merged_into
from zo_opt.adapters.peft_write import exportable, is_native
from zo_opt.errors import ZOError

CARD_NAME = "README.md"  # the model card that a run leaves


@dataclass(frozen=True)
class Uses:
    """What an adapter can be used for.

    Attributes:
        merges: whether some plain model computes the same.
        peft: "native": it is saved in PEFT's own format; "export": it can be exported as a LoRA; "no".
        on_answers: whether it acts on answers alone.
        whole: whether the model's own weights are trained, and nothing is added.
        writes: whether the model writes text.
    """

    merges: bool
    peft: Literal["native", "export", "no"]
    on_answers: bool
    whole: bool
    writes: bool = True

    def before(self) -> str:
        """At a run's start: what it will be good for, while something else can still be chosen."""
        if self.whole:
            return (
                "later: the model's own weights are trained; zo-opt merge writes them as a plain model for any runtime."
            )
        if self.on_answers:
            return (
                "later: this adapter acts on answers alone, as no weight does, so that it runs in zo_opt and can be neither merged nor loaded by "
                "PEFT or other runtimes; --adapter lora gives one that can."
            )
        merged = "zo-opt merge makes a plain model of it for any runtime"
        sentences = {
            "native": "this adapter is saved in PEFT's own format" + (f", and {merged}" if self.merges else ""),
            "export": f"{merged}, or with --as lora a LoRA that PEFT loads",
            "no": f"{merged}; PEFT has no form for it" if self.merges else
            "this adapter runs in zo_opt and can be neither merged nor loaded by PEFT or other runtimes; --adapter lora gives one that can",
        }  # fmt: skip
        return f"later: {sentences[self.peft]}."

    def after(self, directory: str, *, labels: bool) -> str:
        """At a run's end: what to do with what is in its directory; ``labels``: whether it learned labels.

        >>> Uses(merges=True, peft="export", on_answers=False, whole=False).after("out", labels=True)
        'use it: zo-opt predict or generate out; a plain model: zo-opt merge out --to DIR, with --as lora a LoRA for PEFT; more: out/README.md'
        """
        commands = ["predict"] * labels + ["generate"] * self.writes
        ways = [f"use it: zo-opt {' or '.join(commands)} {directory}"] if commands else []
        if self.merges:
            lora = ", with --as lora a LoRA for PEFT" if self.peft == "export" else ""
            ways.append(f"a plain model: zo-opt merge {directory} --to DIR{lora}")
        if self.peft == "native":
            ways.append("PEFT loads it as it is")
        if not self.merges and self.peft == "no":
            ways.append("it runs in zo_opt alone")
        return "; ".join([*ways, f"more: {directory}/{CARD_NAME}"])


def uses_of(model: AdapterModel) -> Uses:
    """What a model's adapters can be used for."""
    config, adapted = model.adapter_config, model.adapted_modules()
    peft: Literal["native", "export", "no"] = "no"
    if is_native(model.wrapped, config):
        peft = "native"
    elif exportable(model):
        peft = "export"
    writes = getattr(model.wrapped, "can_generate", bool)()
    return Uses(_merges(model), peft, config.positions == "answer", not adapted, writes)


def _merges(model: AdapterModel) -> bool:
    try:
        model.adapter_config.check_mergeable()
        for module in model.adapted_modules().values():
            if module.merged != "weight":  # which every layer has
                merged_into(module)
    except ZOError:
        return False
    return True
