"""Runs prompts through the frozen base, once a sequence, and keeps what the answer needs of them.

Why it is never stale: a sequence is found by the digest of its tokens; nothing that the prompt goes through is trained; and nothing is
kept while a module is in training mode (dropout), or once a frozen tensor is not the one, in memory and version, that it was.

Shape suffixes: N sequences, S tokens, T answer tokens, C copies, H hidden, P prompt tokens, W all keys and values of a token.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zo_opt.prompts.states import KeyShapes, PromptState, Span, join_keys, padded, spans_of
from zo_opt.prompts.store import FileStore, MemoryStore
from zo_opt.system.checksum import checksum, fingerprint
from zo_opt.system.layers import layer_of
from zo_opt.system.replaced import replaced

KINDS = ("full_attention", "sliding_attention")
Keeps = Literal["keys", "layers", "output"]


class Recorder:
    """What the frozen base makes of prompts.

    Args:
        model: the whole model.
        body: the module that has the layers.
        run: the body's own forward.
        asleep: a context within which no adapter acts.
        adapted: paths of the adapted modules in the model.
        keeps: "keys" of the prompt and what enters the first adapted layer after it; where whole sequences count as answer, what leaves
            the "layers" below that one, or the body's "output".

    Attributes:
        arguments: names of the body's arguments, in order.
        cut: layers below the first adapted one, which are not run again.
        depth, layers: of the body's stack.
        counts_real: whether position ids that are not given count real tokens alone; else padding as well.
        store: sequences kept across batches; None: those of the last batch alone.
        recorded: sequences that went through the base.
        full: whether the store had no room for some.
    """

    def __init__(
        self, model: nn.Module, body: nn.Module, run: Callable[..., Any],
        asleep: Callable[[], AbstractContextManager[None]], adapted: Sequence[str], *, keeps: Keeps,
    ) -> None:  # fmt: skip
        self._model, self._body, self._run, self._asleep, self.keeps = model, body, run, asleep, keeps
        self.arguments = list(inspect.signature(run).parameters)
        paths = {id(module): name for name, module in model.named_modules()}
        prefix = paths.get(id(body), "")
        stacks = {
            place[0]: module
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and (place := layer_of(f"{name}.0")) and name.startswith(prefix)
        }
        places = [place for name in adapted if (place := layer_of(name)) is not None and place[0] in stacks]
        stack = max(stacks, key=lambda name: len(stacks[name]), default="")
        self.layers: list[nn.Module] = list(stacks[stack].children()) if stacks else []
        alone = len(places) == len(adapted) and {name for name, _ in places} == {stack}
        lowest = min(index for _, index in places) if alone else 0
        self.cut = 1 if keeps == "output" else lowest
        self.depth = len(self.layers)
        self.shapes: KeyShapes = ()
        self.counts_real = False
        self.store: MemoryStore | FileStore | None = None
        self.recorded, self.full = 0, False
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._width = 0  # W
        self._extra_outputs: int | None = None  # of a layer that returns a tuple: its length beyond the hidden states
        base = [(n, t) for n, t in (*model.named_parameters(), *model.named_buffers()) if "adapter" not in n.split(".")]
        self._frozen = {n: t for n, t in base if not t.requires_grad}
        # New adapters are in training mode, and take no part.
        named = [(name.split("."), module) for name, module in body.named_modules()]
        self._base = [m for parts, m in named if "adapter" not in parts and not hasattr(m, "base_layer")]
        self._marks = self._current_marks()

    @torch.no_grad()
    def prepare(
        self, ids_NS: Tensor, attention_NS: Tensor | None, answers_NS: Tensor, positions_NS: Tensor | None = None
    ) -> PromptState:
        """The prompts of a batch, done: kept ones as they were, the others now.

        Args:
            ids_NS: tokens.
            attention_NS: 0 where there is none.
            answers_NS: the answer positions.
            positions_NS: position ids, if the model is given any.
        """
        attention_NS = torch.ones_like(ids_NS) if attention_NS is None else attention_NS
        if positions_NS is None:
            real = attention_NS if self.counts_real else torch.ones_like(ids_NS)
            positions_NS = (real.cumsum(1) - 1).clamp(min=0)
        positions_NS = positions_NS.expand_as(ids_NS)
        spans = spans_of(ids_NS, attention_NS, answers_NS, positions_NS)
        self._known = self._found(spans)
        missing = [i for i, span in enumerate(spans) if span.key not in self._known]
        if missing:
            rows = torch.tensor(missing, device=ids_NS.device)
            self._record([spans[i] for i in missing], ids_NS[rows], attention_NS[rows], positions_NS[rows])
        parts = [self._known[span.key] for span in spans]
        device = ids_NS.device
        answers = [torch.arange(span.answer, span.end, device=device) for span in spans]
        prompts = [torch.ones(span.answer - span.first, dtype=torch.bool, device=device) for span in spans]

        def of_answers(x_NS: Tensor) -> Tensor:
            return padded([row[places] for row, places in zip(x_NS, answers, strict=True)], left=False)

        answers_NT = padded([torch.ones_like(places, dtype=torch.bool) for places in answers], left=False)
        places_NT = torch.where(answers_NT, padded(answers, left=False), ids_NS.shape[1])
        return PromptState(
            padded([keys.to(device) for keys, _ in parts], left=True), padded(prompts, left=True),
            of_answers(ids_NS), answers_NT, places_NT, of_answers(positions_NS),
            padded([hidden.to(device) for _, hidden in parts], left=False),
        )  # fmt: skip

    def skip_below(self, stack: ExitStack, hidden: Tensor) -> None:
        """Within the stack of contexts the layers below the cut give these hidden states at no cost."""
        for index, layer in enumerate(self.layers[: self.cut]):
            given = hidden if index == self.cut - 1 else None
            stack.enter_context(replaced(layer, forward=self._stand_in(given)))

    def mask(self, state: PromptState, copies: int) -> Any:
        """Which keys the copies' tokens see, side by side: added to scores, (N, 1, C T, P + C T); one for each kind of layer if there are two."""
        config: Any = getattr(self._body, "config", None)
        valid_NT = state.answers_NT
        tokens, prompt = valid_NT.shape[1], state.prompt_NP.shape[1]
        own = torch.block_diag(*[torch.ones(tokens, tokens, device=valid_NT.device).tril()] * copies).bool()
        seen = torch.cat(
            [state.prompt_NP[:, None].expand(-1, copies * tokens, -1), own & valid_NT.repeat(1, copies)[:, None]], dim=2
        )
        dtype = state.keys_NPW.dtype

        def added(which: Tensor) -> Tensor:
            return torch.zeros(which.shape, dtype=dtype, device=which.device).masked_fill(
                ~which, torch.finfo(dtype).min
            )[:, None]

        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or (() if window is None else KINDS[1:]))
        if not kinds <= set(KINDS):
            raise ValueError(f"it has layers of kind {', '.join(sorted(kinds - set(KINDS)))}")
        if window is None or KINDS[1] not in kinds:
            return added(seen)
        before = torch.arange(-prompt, 0, device=valid_NT.device)  # places relative to the answer's first token
        after = torch.arange(tokens, device=valid_NT.device).repeat(copies)
        near = after[:, None] - torch.cat([before, after])[None] < window
        return added(seen & near) if kinds == {KINDS[1]} else {KINDS[0]: added(seen), KINDS[1]: added(seen & near)}

    def fingerprint(self) -> str:
        """A digest of all that decides the states of given tokens: weights, settings, versions, device."""
        import transformers

        config: Any = getattr(self._model, "config", None)
        settings = config.to_dict() if hasattr(config, "to_dict") else {}
        for name in ("_name_or_path", "transformers_version"):
            settings.pop(name, None)
        kinds = [type(module).__name__ for module in self._body.modules()]
        versions = [torch.__version__, transformers.__version__]
        device = next(self._body.parameters()).device.type
        attention = getattr(config, "_attn_implementation", None)
        plain = json.dumps([self.cut, settings, attention, kinds, versions, device], default=str, sort_keys=True)
        return checksum([fingerprint(self._frozen).encode(), plain.encode()], 32)

    def _found(self, spans: Sequence[Span]) -> dict[bytes, tuple[Tensor, Tensor]]:
        """What is kept of these sequences."""
        if any(module.training for module in self._base):
            return {}
        if (marks := self._current_marks()) != self._marks:
            self._marks, self.store = marks, None
            return {}
        found = {}
        for span in spans:
            known = self._known.get(span.key) or self._kept(span)
            if known is not None:
                found[span.key] = known
        return found

    def _kept(self, span: Span) -> tuple[Tensor, Tensor] | None:
        """A sequence's parts in the store. What has no entries is not there: no prompt, or no layer below."""
        if self.store is None or not self._width:
            return None
        keys, hidden = (self.store.get(half) for half in span.halves)
        if keys is None and span.answer == span.first:
            keys = torch.empty(0, self._width, device=self.store.device, dtype=getattr(hidden, "dtype", None))
        if hidden is None and self.cut == 0 and keys is not None:
            hidden = keys.new_empty(span.end - span.answer, 0)
        return None if keys is None or hidden is None else (keys, hidden)

    def _record(self, spans: Sequence[Span], ids: Tensor, attention: Tensor, positions: Tensor) -> None:
        """Run whole sequences through the base and keep their parts."""
        seen: list[Tensor] = []
        trained: list[str] = []
        hooks = [
            module.register_forward_pre_hook(lambda *_, n=name: trained.append(n))
            for name, module in self._body.named_modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
        ]
        if self.cut and self.keeps != "output":
            below = self.layers[self.cut - 1]
            hooks.append(below.register_forward_hook(lambda _m, _a, out: self._see(out, seen)))
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": attention}
        if "position_ids" in self.arguments:
            given["position_ids"] = positions
        try:
            with self._asleep():
                keys_NSW = self._run_all(given) if self.keeps == "keys" else self._run_below(given, seen)
        finally:
            for hook in hooks:
                hook.remove()
        if trained:
            raise ValueError(f"{trained[0]} is trained, and the prompt goes through it")
        hidden_NSH = seen[0] if seen else keys_NSW[..., :0]
        self._width = keys_NSW.shape[-1]
        self.recorded += len(spans)
        for span, keys, hidden in zip(spans, keys_NSW, hidden_NSH, strict=True):
            # Copies of their own: a view would keep the whole batch.
            parts = keys[span.first : span.answer].clone(), hidden[span.answer : span.end].clone()
            self._known[span.key] = parts
            if self.store is not None and not self.full:
                kept = [self.store.put(half, x) for half, x in zip(span.halves, parts, strict=True) if x.numel()]
                self.full = not all(kept)

    def _run_below(self, given: dict[str, Any], seen: list[Tensor]) -> Tensor:
        """The layers below the cut alone; what stands for keys, of which there are none."""
        with suppress(_BelowError):
            output = self._run(**given)
            if self.keeps == "output":
                seen.append(output.last_hidden_state)
        return seen[0]

    def _run_all(self, given: dict[str, Any]) -> Tensor:
        """All layers; keys, values and the body's output, (N, S, W)."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        final_NSH = self._run(**given, past_key_values=cache, use_cache=True).last_hidden_state
        pairs = [(layer.keys, layer.values) for layer in cache.layers[self.cut :]]
        if len(pairs) != self.depth - self.cut:
            raise ValueError(f"its {self.depth} layers keep keys and values {len(pairs) + self.cut} times")
        self.shapes = [(k.shape[1], k.shape[3], v.shape[3]) for k, v in pairs]
        return torch.cat([join_keys(pairs), final_NSH.to(pairs[0][0].dtype)], dim=-1)

    def _see(self, output: Any, seen: list[Tensor]) -> None:
        self._extra_outputs = len(output) - 1 if isinstance(output, tuple) else None
        seen.append(output[0] if isinstance(output, tuple) else output)
        if self.keeps == "layers":
            raise _BelowError

    def _stand_in(self, hidden: Tensor | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            there = hidden if hidden is not None else args[0] if args else kwargs["hidden_states"]
            return there if self._extra_outputs is None else (there, *[None] * self._extra_outputs)

        return forward

    def _current_marks(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t._version) for t in self._frozen.values()]


class _BelowError(Exception):
    pass
