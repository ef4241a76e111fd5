"""Hidden states of the frozen part below the first adapter, computed once a sequence.

With adapters in the last k of L layers those states never change, so that a forward pass costs k/L of its layers. They are kept
on the device, in CPU memory or in a file, up to a bound; sequences beyond it are computed as without a cache.

Why they are never stale: a sequence is found by the digest of its tokens; nothing below the cut is trained (tried on two tokens);
and states are neither recorded nor used while a module below the cut is in training mode (dropout) or a tensor
there is not the one, in memory and version, that it was at the start. A file also carries the fingerprint of all
that made it.

Shape suffixes: B examples, C labels, S tokens, H hidden, N = B * C sequences.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_opt.adapters import AdapterModel
from zo_opt.errors import reason_of
from zo_opt.prompts.prefix_store import FILE_NAME, FileStore, MemoryStore
from zo_opt.system.checksum import checksum, fingerprint
from zo_opt.system.layers import layer_of
from zo_opt.system.replaced import replaced


class PrefixCache:
    """States after the last layer below all adapters, unpadded, as the model computes them.

    Args:
        model: a model with adapters in one stack of layers, none in the first.
        max_bytes: bound on the states kept.
        place: "device" (the model's), "cpu" or "disk". On disk nothing is kept before :meth:`open`.

    Attributes:
        objection: why this model cannot be cut here, in words; None where it can.
        store: where the states are.
        recorded_examples: examples that went through the layers below the cut.
        full: whether there was no room for some.
    """

    def __init__(self, model: AdapterModel, max_bytes: int, place: str = "device") -> None:
        cut = first_adapted_layer(model)
        assert cut is not None, "ask first_adapted_layer() before building a cache"
        stack, self.cut = cut
        layers: list[nn.Module] = list(model.wrapped.get_submodule(stack).children())
        self.depth = len(layers)
        self._below = layers[: self.cut]
        self._model, self._max_bytes, self.place = model, max_bytes, place
        self._device = next(model.parameters()).device
        self.store: MemoryStore | FileStore = MemoryStore(
            0 if place == "disk" else max_bytes, self._device if place == "device" else torch.device("cpu")
        )
        self.recorded_examples = 0
        self.full = False
        named = [(n, m) for n, m in model.wrapped.named_modules() if (layer_of(n) or (stack, -1))[1] < self.cut]
        self._modules = [module for _, module in named]
        self._frozen = {
            f"{n}.{k}": t
            for n, m in named
            for k, t in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]
            if not t.requires_grad
        }
        self._marks = self._current_marks()
        self._extra_outputs: int | None = None  # a layer that returns a tuple: its length beyond the hidden states
        self._replayed: Tensor | None = None
        self.objection = self._try()

    def open(self, directory: Path) -> None:
        """Use the file in a directory, with what an earlier run of the same model left there; of no effect but on disk.

        Raises:
            ZOError: it cannot be written, or another run uses it.
        """
        if self.place == "disk":
            self.store = FileStore(directory / FILE_NAME, self._max_bytes, self.fingerprint())

    def fingerprint(self) -> str:
        """A digest of all that decides the states of given tokens: weights, modules and settings below the cut, versions, device."""
        import transformers

        config: Any = getattr(self._model, "config", None)
        settings = config.to_dict() if hasattr(config, "to_dict") else {}
        for name in ("_name_or_path", "transformers_version"):
            settings.pop(name, None)
        attention = getattr(config, "_attn_implementation", None)
        kinds = [type(m).__name__ for m in self._modules]
        versions = [torch.__version__, transformers.__version__]
        plain = json.dumps(
            [self.cut, settings, attention, kinds, versions, self._device.type], default=str, sort_keys=True
        )
        return checksum([fingerprint(self._frozen).encode(), plain.encode()], 32)

    @torch.no_grad()
    def record(self, batch: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        """Run the layers below the cut on a batch, unless all of it is kept already, and keep each sequence's states.

        Args:
            batch: with input_ids and attention_mask (B, C, S).
            inputs: the model's arguments for it, (N, S).
        """
        spans = sequences(batch)
        if self.full or not self._usable() or all(span.key in self.store for span in spans):
            return
        states_NSH = self._run_below(inputs).to(self.store.device)
        self.recorded_examples += len(batch["input_ids"])
        for span, states in zip(spans, states_NSH, strict=True):
            if not self.store.put(span.key, states[span.first : span.end]):
                self.full = True
                return

    def batch(self, batch: dict[str, Tensor]) -> Tensor | None:
        """States of a batch padded as its mask is, (B, C, S, H), on the model's device; None where one of them is not kept."""
        spans = sequences(batch)
        if not self._usable() or any(span.key not in self.store for span in spans):
            return None
        states = [self.store.get(span.key) for span in spans]
        found = [s for s in states if s is not None]
        if len(found) < len(spans):
            return None
        shape = (len(spans), batch["input_ids"].shape[-1], found[0].shape[-1])
        # From pinned memory the copy to the device goes on while the CPU does.
        pinned = self._device.type == "cuda" and self.store.device.type == "cpu"
        out_NSH = torch.zeros(shape, dtype=found[0].dtype, device=self.store.device, pin_memory=pinned)
        for row, span, state in zip(out_NSH, spans, found, strict=True):
            row[span.first : span.end] = state
        out: Tensor = out_NSH.to(self._device, non_blocking=True).unflatten(0, batch["input_ids"].shape[:2])
        return out

    @contextmanager
    def replay(self, states_NSH: Tensor) -> Iterator[None]:
        """Within this context the layers below the cut return the given states at no cost."""
        self._replayed = states_NSH
        try:
            with ExitStack() as stack:
                for layer in self._below[:-1]:
                    stack.enter_context(replaced(layer, forward=self._pass))
                stack.enter_context(replaced(self._below[-1], forward=self._return_replayed))
                yield
        finally:
            self._replayed = None

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        return self._as_output(args[0] if args else kwargs["hidden_states"])

    def _return_replayed(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._as_output(self._replayed)

    def _as_output(self, hidden: Any) -> Any:
        return hidden if self._extra_outputs is None else (hidden, *[None] * self._extra_outputs)

    def _run_below(self, inputs: dict[str, Tensor]) -> Tensor:
        captured: list[Tensor] = []

        def capture(_module: nn.Module, _args: Any, output: Any) -> None:
            self._extra_outputs = len(output) - 1 if isinstance(output, tuple) else None
            captured.append(output[0] if isinstance(output, tuple) else output)
            raise _PrefixDoneError

        handle = self._below[-1].register_forward_hook(capture)
        try:
            with suppress(_PrefixDoneError):
                self._model(**inputs)
        finally:
            handle.remove()
        return captured[0]

    def _current_marks(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t._version) for t in self._frozen.values()]

    def _usable(self) -> bool:
        """Whether the part below the cut is as it was, and computes the same every time."""
        return not any(m.training for m in self._modules) and self._current_marks() == self._marks

    @torch.no_grad()
    def _try(self) -> str | None:
        """Run two short sequences with and without replay; what speaks against a cache, if anything does."""
        ids = torch.tensor([[0, 1, 1], [1, 0, 1]], device=self._device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        reached: list[str] = []
        handles = [
            m.register_forward_pre_hook(lambda *_, n=n: reached.append(n))
            for n, m in self._model.wrapped.named_modules()
            if any(p.requires_grad for p in m.parameters(recurse=False))
        ]
        try:
            states = self._run_below(inputs)
            if reached:
                return f"{reached[0]} is trained, and runs before the first adapter"
            whole = self._model(**inputs)[0]
            with self.replay(states):
                replayed = self._model(**inputs)[0]
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            return f"the model does not run with its first layers replaced ({reason_of(error)})"
        finally:
            for handle in handles:
                handle.remove()
        if not torch.allclose(whole, replayed, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
            return "the model's later layers take more from the first ones than their hidden states"
        return None


@dataclass(frozen=True)
class Span:
    """One sequence of a padded batch: a digest of its tokens, and where they lie in the padding."""

    key: bytes
    first: int
    end: int


def sequences(batch: dict[str, Tensor]) -> list[Span]:
    """The N sequences of a batch with input_ids and attention_mask (B, C, S)."""
    ids_NS, mask_NS = (batch[name].flatten(0, 1).cpu().numpy() for name in ("input_ids", "attention_mask"))
    found = []
    for ids, mask in zip(ids_NS, mask_NS, strict=True):
        first = int(mask.argmax())
        end = first + int(mask.sum())
        found.append(Span(sha256(ids[first:end].tobytes()).digest()[:16], first, end))
    return found


def first_adapted_layer(model: AdapterModel) -> tuple[str, int] | None:
    """(stack, index) of the lowest adapted layer, where everything below it is frozen and a cache can be cut; else None."""
    places = [layer_of(name) for name in model.adapted]
    if any(place is None for place in places) or model.config.is_encoder_decoder:
        return None
    # What is trained outside the layers runs after them (a head), or is found out when the cache is tried.
    places += [place for name in model.trained if (place := layer_of(name)) is not None]
    if not places:
        return None
    stacks = {place[0] for place in places if place is not None}
    lowest = min(place[1] for place in places if place is not None)
    if len(stacks) != 1 or lowest == 0:
        return None
    return stacks.pop(), lowest


class _PrefixDoneError(Exception):
    pass
