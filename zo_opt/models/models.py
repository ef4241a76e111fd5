"""Loading a model and its tokenizer, checked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from zo_opt.errors import ZOError, reason_of
from zo_opt.models import builtin
from zo_opt.models.agreement import settle_classifier
from zo_opt.models.gguf_file import lazy_tensors
from zo_opt.models.load_report import heed_report
from zo_opt.models.quantisation import quiet
from zo_opt.models.streaming import read_one_by_one
from zo_opt.system.checksum import plain_parts
from zo_opt.system.memory import MappedFiles, pieces, trim

Head = Literal["lm", "classification"]
HEADS: tuple[str, ...] = get_args(Head)


def load_model(
    name_or_path: str,
    *,
    head: str = "lm",
    labels: int = 2,
    trust_remote_code: bool = False,
    form: str = "fp32",
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Any, Any]:
    """A model of transformers and its tokenizer, in evaluation mode, weights in the checkpoint's dtype.

    Args:
        name_or_path: the built-in name, a Hugging Face id, a local directory, or a GGUF file of a causal model, whose numbers are
            dequantised.
        head: "lm" (label words; causal, masked or encoder-decoder, by the checkpoint's architecture) or "classification".
        labels: number of classes of a classification head.
        trust_remote_code: let the checkpoint's own Python code run; never the default.
        form: what ``set_precision`` will bring the model into, on a CPU. A GGUF file's matrices are made so as they are read, and a model
            that this quantised can take no other form.
        say: told what is fetched.

    Raises:
        ZOError: it cannot be found or loaded, has no head for the task, or holds NaN weights.
    """
    if head not in HEADS:
        raise ZOError(f"head={head!r} is not known; choose one of {', '.join(HEADS)}.")
    import transformers

    # Its own progress bars and load reports would tear ours.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    source, file = _source(name_or_path, say)
    options = {"trust_remote_code": trust_remote_code} | file
    try:
        # Of GGUF files transformers draws a progress bar that it cannot be told to leave.
        reading = read_one_by_one(form) if file else nullcontext()
        # A new head is drawn from the global random state.
        with quiet(stderr=bool(file)), reading, torch.random.fork_rng():
            config = transformers.AutoConfig.from_pretrained(source, **options)
            if file:  # which names no architecture
                config.architectures = ["ForCausalLM"]
            auto = auto_class(transformers, config, head, name_or_path)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            loading = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            if file and head == "classification":
                config.num_labels = labels
            if file and (lazy := lazy_tensors(Path(name_or_path), config, auto)) is not None:
                trim()  # what its metadata took
                kind, tensors = lazy
                model, loaded = kind.from_pretrained(
                    None, config=config, state_dict=tensors, dtype=torch.float32, **loading
                )
            else:
                model, loaded = auto.from_pretrained(
                    source, dtype=torch.float32 if file else "auto", use_safetensors=True, **loading, **options,
                    **({"num_labels": labels} if head == "classification" else {}),
                )  # fmt: skip
    except (ZOError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of damaged files their readers raise whatever they come upon; tokenizers an Exception
        reason = reason_of(error)
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own, which runs with --trust_remote_code alone"
        raise ZOError(
            f"model {name_or_path!r} could not be loaded ({reason}); give {builtin.DEFAULT_MODEL!r}, a local directory or a Hugging Face id."
        ) from error
    if file:
        builtin.forget_gguf(model)
        model.quantised_as_read = form.partition(", ")[2]
        model.config._name_or_path = name_or_path
    heed_report(loaded, model, head, config, name_or_path, say)
    _draw_new_weights(model, sorted(loaded["missing_keys"]))
    files = MappedFiles()
    for name, parameter in model.named_parameters():
        if not all(_is_finite(part, files) for _, part in plain_parts(name, parameter)):
            raise ZOError(f"model {name_or_path!r} holds NaN or infinity in {name!r}; load sound weights.")
    if head == "classification":
        _complete(transformers, model, tokenizer, source)
    return model.eval(), tokenizer


def _complete(transformers: Any, model: Any, tokenizer: Any, source: str) -> None:
    """Have a classifier's configuration say what its forward reads there, part of which may stand elsewhere."""
    if model.config.is_encoder_decoder and getattr(model.config, "decoder_start_token_id", None) is None:
        with suppress(OSError):  # no such file
            model.generation_config = transformers.GenerationConfig.from_pretrained(source)
    settle_classifier(model, tokenizer)


def _source(name_or_path: str, say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """Where transformers is to look, and which GGUF file there."""
    if name_or_path == builtin.DEFAULT_MODEL:
        return str(builtin.model_directory(say)), {}
    path = Path(name_or_path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ZOError(f"{path} does not exist or is no file; give the path of a GGUF file.")
        return str(path.parent), {"gguf_file": path.name}
    if path.exists() and not (path / "config.json").is_file():
        raise ZOError(
            f"{path} holds no config.json; give a directory written by save_pretrained, a .gguf file, or a Hugging Face id."
        )
    if not path.exists() and (
        path.is_absolute() or name_or_path[0] in ".~" or len(path.parts) > 2
    ):  # as no id of Hugging Face is
        raise ZOError(
            f"model {name_or_path!r} does not exist; give a local directory where it is, or a Hugging Face id."
        )
    return name_or_path, {}


def _is_finite(tensor: torch.Tensor, files: MappedFiles) -> bool:
    """Whether all entries are numbers; those of eight bits, which torch cannot be asked about, are widened. A piece at a time.

    >>> _is_finite(torch.ones(2).to(torch.float8_e4m3fn), MappedFiles())
    True
    >>> _is_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e5m2), MappedFiles())
    False
    """
    narrow = tensor.is_floating_point() and tensor.element_size() == 1
    for piece in pieces(tensor) if tensor.numel() else ():
        ends = torch.aminmax(
            piece.float() if narrow else piece
        )  # NaN is both; several times as fast as asking each entry
        if not (ends.min.isfinite() and ends.max.isfinite()):
            return False
        files.let_go(piece)
    return True


def classification_heads(model: Any) -> list[str]:
    """New modules of a classification model (drawn, not loaded), trained and saved whole; BERT's are pooler and classifier."""
    if getattr(model, "new_modules", None):
        return list(model.new_modules)
    others = {n: child for n, child in model.named_children() if child is not model.base_model}
    return [n for n, child in others.items() if next(child.parameters(), None) is not None]


@torch.no_grad()
def _draw_new_weights(model: Any, names: list[str]) -> None:
    """The same start for a new head in every run: redrawn with a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.ndim > 1:
            parameter.normal_(std=getattr(model.config, "initializer_range", 0.02), generator=generator)
    model.new_modules = sorted({name.rpartition(".")[0] for name in names})


def check_device(name: str) -> None:
    """Whether there may be a device of that name; nothing is put on it.

    Raises:
        ZOError: there is none.
    """
    there = torch.cuda.device_count()
    here = "auto, cpu or cuda:0" if there else "auto or cpu (or cuda:0 on a machine that has it)"
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise ZOError(f"device {name!r} is not known; give {here}.") from error
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ZOError(f"device {name!r} is not there: torch sees {there} CUDA devices; give {here}.")


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto": CUDA where there is one, else the CPU.

    Raises:
        ZOError: there is none of that name, or it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    device = torch.device(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ZOError(f"device {name!r} cannot be used ({reason_of(error)}); give auto or cpu.") from error
    return device


def auto_class(transformers: Any, config: Any, head: str, name: str) -> Any:
    """transformers' class for a config and a kind of head.

    Raises:
        ZOError: the config names no architecture with a language-model head.
    """
    if head == "classification":
        return transformers.AutoModelForSequenceClassification
    architectures = " ".join(getattr(config, "architectures", None) or ())
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    if "MaskedLM" in architectures:
        return transformers.AutoModelForMaskedLM
    if "CausalLM" in architectures or "LMHead" in architectures:
        return transformers.AutoModelForCausalLM
    given = architectures or "no architecture"
    raise ZOError(
        f"model {name!r} (its config says {given}) has no language-model head for label words; "
        "give --head classification to train a new classification head."
    )
