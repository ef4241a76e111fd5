"""The forward from the answer on: the prompt once through the frozen base, the answer's tokens through the adapters, in several copies.

Exactly what a model gives whose adapters are masked at the prompt, at the cost of the answer's tokens: the prompt's keys and values do not
depend on adapters, and layers below the first adapted one do not depend on them anywhere. Copies of the answer stand side by side on
the sequence axis of one forward; each sees the prompt and itself, so that the prompt's keys are never repeated. Models that cannot take
such a mask get copies as rows. Which way a model can go is tried once, on its own first batch, against the masked forward; where
neither agrees, the masked forward is used, and ``objection`` says why.

Shape suffixes: N sequences, S tokens, T answer tokens, C copies, H hidden, P prompt tokens, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.beside import Beside, changed, places_of
from zo_opt.adapters.kept import KeptForward
from zo_opt.adapters.layout import Axis, Layout
from zo_opt.adapters.positions import Positions
from zo_opt.errors import ZOError, reason_of
from zo_opt.prompts.recorder import Recorder
from zo_opt.prompts.states import PromptState, scatter, split_keys
from zo_opt.system.replaced import replaced
from zo_opt.system.vmap import is_batched

NARROW = 3e-2  # of the largest hidden state: what two ways of computing the same may differ by in bf16; in float32 1e-4
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError)


class AnswerForward(KeptForward):
    """Stands in for a model's body while adapters act on answers alone.

    Args:
        model: the whole model.
        body: the module whose output the head reads.
        positions: where its adapters act.
        adapted: paths of the adapted modules.

    Attributes:
        copies: how many the next forward is made in.
        layout: of the last forward.
        trying: whether a way is being tried, which is nobody else's business.
        ended: takes the body's output at the answer positions, (C, N, T, H), and gives what is to stand there.
    """

    def __init__(self, model: nn.Module, body: nn.Module, positions: Positions, adapted: Sequence[str]) -> None:
        super().__init__(body)
        self.positions = positions
        self._whole = positions.everywhere or positions.kind != "causal"
        self.recorder = Recorder(
            model, body, self.plain, positions.sleep, adapted, keeps="layers" if self._whole else "keys"
        )
        if self._whole and self.recorder.cut == 0:
            self.objection = "nothing is frozen below the first adapter, or adapters sit in several places"
        self.copies, self.layout = 1, Layout("rows", 1, 0)
        self.trying = self._grad = False
        self.ended: Callable[[Tensor], Tensor] | None = None
        self._axis: Axis | None = None
        self._tried = False
        self._takes_beside: bool | None = None

    @property
    def depth_share(self) -> float:  # type: ignore[override]
        """Of the layers, those from the first adapted one on."""
        return (self.recorder.depth - self.recorder.cut) / self.recorder.depth

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The body's forward, adapters acting at the answer positions."""
        given = self.named(args, kwargs)
        if self.positions.asleep:
            return self.plain(**given)
        if self.positions.everywhere or self.positions.kind == "encoder-decoder":
            return self._masked(given, None)
        ids = given.get("input_ids")
        if ids is None:  # embeddings stand for tokens
            ids = given["inputs_embeds"].new_zeros(given["inputs_embeds"].shape[:2], dtype=torch.long)
        attention = given.get("attention_mask")
        past = given.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:  # all that is written is answer
            return self._masked(given, None)
        if self.state is not None and not self._whole:
            return self._from(self.state, ids.shape[1])
        if attention is not None and attention.ndim != 2:
            attention = None
        answers = self.positions.answers(ids, attention)
        plain_mask = attention is given.get("attention_mask")  # and not one of the caller's own shape
        if self.positions.kind == "encoder" and plain_mask and self.stands_beside():
            return self._beside(given, answers, torch.ones_like(ids) if attention is None else attention)
        state = None
        if past is None and given.get("inputs_embeds") is None and not self._whole:
            state = self._done(ids, attention, answers, given.get("position_ids"))
        return self._masked(given, answers) if state is None else self._from(state, ids.shape[1])

    def prepare(self, inputs: Mapping[str, Tensor], answers_NS: Tensor | None) -> PromptState | None:
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        with self.positions.given(attention != 0 if self._whole else answers_NS):
            answers = self.positions.answers(ids, attention)
        return self._done(ids, attention, answers, inputs.get("position_ids"))

    @torch.no_grad()
    def end_of(self, call: Callable[[], Any]) -> Tensor:
        """The body's output at the answer positions in a call, (C, N, T, H); the rest of the call is not run.

        Raises:
            ZOError: the call does not run the model.
        """
        found: list[Tensor] = []

        def stop(hidden_CNTH: Tensor) -> Tensor:
            found.append(hidden_CNTH)
            raise _EndedError

        with suppress(_EndedError), replaced(self, ended=stop):
            call()
        if not found:
            raise ZOError("the closure did not run the model; it is to return what the model makes of the batch.")
        return found[0]

    def _done(
        self, ids: Tensor, attention: Tensor | None, answers: Tensor, positions: Tensor | None
    ) -> PromptState | None:
        """The prompts of these sequences, done apart; None where they cannot be, which is tried at the first call."""
        if self.objection is not None or is_batched(ids):
            return None
        if not self._tried:
            self._tried = True
            attention = torch.ones_like(ids) if attention is None else attention
            with replaced(self, trying=True):
                (self._try_whole if self._whole else self._try)(ids, attention, answers, positions)
        return None if self.objection is not None else self.recorder.prepare(ids, attention, answers, positions)

    def _from(self, state: PromptState, tokens: int) -> Any:
        """A forward of the answers' tokens, and the body's output for whole sequences."""
        assert self._axis is not None
        with self._watched():
            output = self._run(state, self._axis, self.copies)
        hidden_CNTH = self.layout.take(output.last_hidden_state)
        if self.ended is not None:
            hidden_CNTH = self.ended(hidden_CNTH)
        whole_NSH = state.ending(hidden_CNTH[0], tokens)
        output.last_hidden_state, output.past_key_values = whole_NSH, None
        return output

    def _watched(self) -> AbstractContextManager[Any]:
        """Whoever takes the body's output wants no gradient of what is before it."""
        self._grad = torch.is_grad_enabled()
        return nullcontext() if self.ended is None else torch.no_grad()

    def _run(self, state: PromptState, axis: Axis, copies: int, *, spoiled: bool = False) -> Any:
        """The body's forward over the answers' tokens; ``spoiled``: all copies but the first get something else."""
        from transformers import DynamicCache

        ids, hidden = state.ids_NT, state.hidden_NTH
        sequences, answer = ids.shape
        self.layout = Layout(axis, copies, sequences, valid_NT=state.answers_NT)
        along, own = (1, answer) if axis == "tokens" else (0, sequences)

        def repeated(x: Tensor) -> Tensor:
            return torch.cat([x] * copies, along) if copies > 1 else x

        ids, hidden = repeated(ids), repeated(hidden)
        if spoiled:
            ids, hidden = ids.clone(), hidden.clone()
            for x in (ids, hidden):
                others = x.narrow(along, own, x.shape[along] - own)
                others.copy_(others.flip(-1) if x.is_floating_point() else (others + 1) % 2)
        cache: Any = DynamicCache()
        below = state.prompt_NP[:, None, :, None].to(state.keys_NPW.dtype)
        for layer in range(self.recorder.cut):  # which are not run: their length is asked for
            cache.update(below, below, layer)
        for layer, pair in enumerate(split_keys(state.keys_NPW, self.recorder.shapes)):
            keys, values = (x if axis == "tokens" else repeated(x) for x in pair)
            cache.update(keys, values, self.recorder.cut + layer)
        given: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": False}
        if "position_ids" in self.recorder.arguments:
            given["position_ids"] = repeated(state.positions_NT)
        if axis == "tokens":
            given["attention_mask"] = self.recorder.mask(state, copies)
        else:
            given["attention_mask"] = repeated(torch.cat([state.prompt_NP, state.answers_NT], 1).long())
        with ExitStack() as stack:
            self.recorder.skip_below(stack, hidden)
            return self.plain(**given)

    def _masked(self, given: dict[str, Any], answers_NS: Tensor | None) -> Any:
        """The plain forward, adapters masked, copies as rows; of an encoder-decoder's decoder all positions are answers."""
        tensors = [x for x in given.values() if isinstance(x, Tensor)]
        sequences, copies = tensors[0].shape[0], self.copies

        def repeated(x: Any) -> Any:
            fits = isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == sequences
            return x.repeat(copies, *[1] * (x.ndim - 1)) if fits and copies > 1 else x

        places, valid = (None, None) if answers_NS is None or self.ended is None else places_of(answers_NS)
        others_NS, real_NS = None if answers_NS is None else ~answers_NS, given.get("attention_mask")
        if others_NS is not None and real_NS is not None and real_NS.ndim == 2:
            others_NS = others_NS & (real_NS != 0)
        self.layout = Layout("rows", copies, sequences, places, valid, others_NS=others_NS)
        with ExitStack() as stack:
            stack.enter_context(self.positions.masked(repeated(answers_NS)))
            stack.enter_context(self._watched())
            if self.state is not None:
                tokens = tensors[0].shape[1]
                self.recorder.skip_below(stack, repeated(self.state.ending(self.state.hidden_NTH, tokens)))
            inner = self.positions.kind == "encoder" and self.ended is not None
            if inner:  # a pooler may follow within the body
                stack.callback(self.recorder.layers[-1].register_forward_hook(self._end_layer).remove)
            output = self.plain(**{name: repeated(x) for name, x in given.items()})
        if self.ended is not None and not inner:
            output.last_hidden_state = self._end(output.last_hidden_state)
        return output

    def _beside(self, given: dict[str, Any], answers_NS: Tensor, real_NS: Tensor, *, spoiled: bool = False) -> Any:
        """The forward of an encoder's rows, and of copies of their answers beside them."""
        dtype = next(p.dtype for p in self.body.parameters() if p.is_floating_point())
        beside = Beside(answers_NS, real_NS, self.copies, dtype, spoiled=spoiled)
        self.layout = beside.layout

        def ended(answers_CNTH: Tensor) -> Tensor:
            torch.set_grad_enabled(self._grad)  # until the body returns: a pooler's gradient is wanted
            return answers_CNTH if self.ended is None else self.ended(answers_CNTH)

        layers = self.recorder.layers
        with ExitStack() as stack:
            stack.enter_context(self.positions.masked(beside.acting_NK))
            stack.enter_context(self._watched())
            if self.state is not None:
                self.recorder.skip_below(stack, self.state.ending(self.state.hidden_NTH, answers_NS.shape[1]))
                layers = layers[self.recorder.cut :]
            beside.within(stack, layers, ended)
            return self.plain(**given | {"attention_mask": beside.mask()})

    @torch.no_grad()
    def stands_beside(self) -> bool:
        """Whether this encoder takes copies beside its rows: tried once, with adapters asleep, on made-up rows."""
        if self._takes_beside is None:
            device = next(self.body.parameters()).device
            ids = torch.arange(12, device=device).view(2, 6) + 5
            real = torch.ones_like(ids)
            real[1, 4:] = 0
            answers = torch.zeros_like(real, dtype=torch.bool)
            answers[:, [0, 3]] = True
            given = {"input_ids": ids, "attention_mask": real}
            try:
                with self.positions.sleep(), replaced(self, trying=True, ended=None, state=None, copies=2):
                    right = self.plain(**given).last_hidden_state
                    found = self._beside(given, answers, real, spoiled=True).last_hidden_state
                apart = ((found - right) * real.unsqueeze(-1)).abs().max()
                self._takes_beside = bool(apart <= self._tolerance() * right.abs().max())
            except FAILURES:
                self._takes_beside = False
        return self._takes_beside

    def _tolerance(self) -> float:
        """What two ways of computing the same may differ by, as a share of the largest hidden state."""
        return NARROW if any(p.element_size() < 4 for p in self.body.parameters()) else 1e-4

    def _end_layer(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if self.trying:
            return None
        torch.set_grad_enabled(self._grad)  # until the body returns: a pooler's gradient is wanted
        return changed(output, self._end)

    def _end(self, hidden: Tensor) -> Tensor:
        """The hidden states with what ``ended`` puts at the answer positions of the first copy."""
        assert self.ended is not None
        layout = self.layout
        ended = self.ended(layout.take(hidden))[0]
        return ended if layout.places_NT is None else scatter(hidden[: layout.sequences], layout.places_NT, ended)

    @torch.no_grad()
    def _try(self, ids: Tensor, attention: Tensor, answers: Tensor, positions: Tensor | None) -> None:
        """Find the way that agrees with the masked forward on a few rows of the batch, padded on the left by one more."""
        rows = attention.sum(1).argsort()[[0, -1]].unique()
        ids, attention, answers = (F.pad(x[rows], (1, 0)) for x in (ids, attention, answers))
        positions = positions if positions is None or len(positions) == 1 else positions[rows]
        whole: dict[str, Any] = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
        if positions is not None:
            positions = F.pad(positions, (1, 0))
            whole["position_ids"] = positions
        said = "none of its forwards agrees with the plain one"
        for axis in ("tokens", "rows"):
            for counted in (False, True) if positions is None else (False,):
                try:
                    with self.positions.masked(answers):
                        right = self.plain(**whole).last_hidden_state
                    self.recorder.counts_real = counted
                    state = self.recorder.prepare(ids, attention, answers, positions)
                    output = self._run(state, axis, 2, spoiled=True)
                    found = state.ending(self.layout.take(output.last_hidden_state)[0], ids.shape[1])
                except FAILURES as error:
                    said = reason_of(error)
                    continue
                apart = ((found - right) * attention.unsqueeze(-1)).abs().max()
                if bool(apart <= self._tolerance() * right.abs().max()):
                    self._axis = axis
                    return
        self.objection = f"the model does not go on from a prompt that is done ({said})"

    @torch.no_grad()
    def _try_whole(self, ids: Tensor, attention: Tensor, answers: Tensor, positions: Tensor | None) -> None:
        """Whether layers above the cut take nothing from those below but their hidden states."""
        given: dict[str, Any] = {"input_ids": ids[:2], "attention_mask": attention[:2]}
        if positions is not None:
            given["position_ids"] = positions[:2]
        try:
            right = self.plain(**given).last_hidden_state
            with self.replaying(self.recorder.prepare(ids[:2], attention[:2], answers[:2], given.get("position_ids"))):
                found = self._masked(given, None).last_hidden_state
        except FAILURES as error:
            self.objection = f"the model does not run with its first layers replaced ({reason_of(error)})"
            return
        apart = ((found - right) * attention[:2].unsqueeze(-1)).abs().max()
        if not bool(apart <= 1e-3 * right.abs().max()):
            self.objection = "the model's later layers take more from the first ones than their hidden states"


class _EndedError(Exception):
    pass
