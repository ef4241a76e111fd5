"""Where model, tokenizer, configuration and labels say different things: what holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zo_opt.errors import ZOError


def embedding_rows(model: Any) -> int | None:
    """The tokens that a model's embedding knows; None of one that reads no tokens by number."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # CANINE hashes characters
        return None
    rows = getattr(embedding, "num_embeddings", None)
    weight = getattr(embedding, "weight", None)
    return int(rows) if rows is not None else None if weight is None else len(weight)


def padding_id(model: Any, tokenizer: Any) -> int:
    """The token that rows are filled up with: the model's own, by which some find a row's end; else the tokenizer's; else an end token.

    Raises:
        ZOError: none of them has a row in the model's embedding.
    """
    known, text = embedding_rows(model), model.config.get_text_config()
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    for found in (text.pad_token_id, model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, *ends):
        if isinstance(found, int) and found >= 0 and (known is None or found < known):
            return found
    raise ZOError(
        f"neither the model's configuration nor its tokenizer names a padding or an end token among the {known} that its embedding has; "
        "set pad_token_id in config.json."
    )


def decoder_start(model: Any) -> int:
    """The token that an encoder-decoder's decoder begins with, wherever transformers keeps it.

    Raises:
        ZOError: nowhere.
    """
    generation = getattr(model, "generation_config", None)
    for place in (model.config, getattr(model.config, "decoder", None), generation):
        start = getattr(place, "decoder_start_token_id", None)
        start = start[0] if isinstance(start, list) and start else start
        if isinstance(start, int) and 0 <= start < (embedding_rows(model) or start + 1):
            return start
    raise ZOError(
        f"neither config.json nor generation_config.json of this {type(model).__name__} says what its decoder begins with; set "
        "decoder_start_token_id there to a token that its embedding has."
    )


def settle_classifier(model: Any, tokenizer: Any) -> None:
    """Have a classifier's configuration say what its forward reads there: the padding by which a decoder's head finds the last token, and
    the decoder's start.

    Raises:
        ZOError: nothing says it.
    """
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = padding_id(model, tokenizer)
    if model.config.is_encoder_decoder:
        model.config.decoder_start_token_id = decoder_start(model)


def name_outputs(model: Any, names: Sequence[str]) -> None:
    """Have a classifier's configuration say what its outputs stand for."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}


def label_outputs(
    model: Any, labels: Sequence[str], called: Sequence[str] = ()
) -> tuple[list[int], list[str], str | None]:
    """Which output of a classification head stands for each label: the one that the model's ``id2label`` names so.

    Args:
        model: with a classification head.
        labels: of the rows.
        called: what the rows' table calls them, where they are numbers.

    Returns:
        The outputs, one a label; the names of all outputs, in their order; and a sentence where the names do not simply agree.

    Raises:
        ZOError: the head has another number of outputs.
    """
    config, numbers = model.config, list(range(len(labels)))
    if config.num_labels != len(labels):
        raise ZOError(
            f"the model's head has {config.num_labels} outputs, the rows have {len(labels)} labels ({', '.join(labels)}); give rows or a model "
            "that fit each other."
        )
    own = [str(config.id2label.get(i, f"LABEL_{i}")) for i in numbers]
    if getattr(model, "new_modules", None):  # a new head has no numbering of its own
        return numbers, list(labels), None
    unnamed = own == [f"LABEL_{i}" for i in numbers]
    labels = called if called and not unnamed else labels
    if set(own) == set(labels):
        return [own.index(label) for label in labels], own, None
    shown = ", ".join(f"{i} = {name}" for i, name in enumerate(own))
    if [str(i) for i in numbers] == list(labels):
        return (
            numbers,
            own,
            None if unnamed else f"the labels are numbers, taken for those of the model's outputs: {shown}.",
        )
    folded, wanted = [name.strip().casefold() for name in own], [label.strip().casefold() for label in labels]
    distinct = len(set(folded)) == len(set(wanted)) == len(labels)
    outputs: list[int | None] = [folded.index(w) if distinct and w in folded else None for w in wanted]
    free = [i for i in numbers if i not in outputs]
    found = [output if output is not None else free.pop(0) for output in outputs]
    names = [label for _, label in sorted(zip(found, labels, strict=True))]
    if set(folded) == set(wanted) and distinct:
        return found, own, None
    taken = ", ".join(f"{i} = {name}" for i, name in enumerate(names))
    return found, names, (
        f"the model's names for its outputs ({shown}) are not the rows' labels; the outputs are taken for {taken}, which training has to teach it."
    )  # fmt: skip
