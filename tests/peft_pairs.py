"""The same adapters in this package and in PEFT, with the same numbers."""

from __future__ import annotations

import contextlib
import warnings

import peft
import torch
from tiny_models import build, padded_batch, perturb

from zo_opt import get_adapter_model, trainable_parameters

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "value", "word_embeddings"],
    "gpt2": ["c_attn", "c_fc", "wte"],  # Conv1D; wte is tied to the output head
}
LINEAR = {name: targets[:2] for name, targets in TARGETS.items()}


@contextlib.contextmanager
def peft_quietly():
    """PEFT draws from the global random state and warns of things that are meant here."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        yield


def peft_model(name, config):
    with peft_quietly():
        model = peft.get_peft_model(build(name), config).eval()
    perturb([p for p in model.parameters() if p.requires_grad])
    return model


def peft_tensors(model, path):
    """Name -> tensor of PEFT's layer at a path, of its one adapter."""
    prefix = f"base_model.model.{path}."
    found = {}
    for name, parameter in model.named_parameters():
        part = name.removeprefix(prefix).split(".")[0].replace("embedding_", "")
        if name.startswith(prefix) and part != "base_layer":
            found[part] = parameter
    return found


def pair(name, ours, theirs):
    """Models of one base with the same adapters: ours with PEFT's numbers, PEFT's, and which parameter of ours is which of PEFT's."""
    theirs = peft_model(name, theirs)
    model = get_adapter_model(build(name), ours)
    same = []
    for path, module in model.adapted_modules().items():
        tensors = peft_tensors(theirs, path)
        for part, parameter in module.adapter.named_parameters():
            if part in tensors:
                with torch.no_grad():
                    parameter.copy_(tensors[part])
                same.append((f"{path}.{part}", parameter, tensors[part]))
    return model, theirs, same


def assert_trains_alike(name, model, theirs, same, *, steps=20, lr=1e-2):
    """Forward, gradients (1e-5 of the largest), and ``steps`` of AdamW: losses and numbers to 1e-5."""
    batch = padded_batch(name)
    ours_grad = [p for _, p, _ in same if p.requires_grad]
    theirs_grad = [q for _, _, q in same if q.requires_grad]
    assert {id(p) for p in ours_grad} == {id(p) for p in trainable_parameters(model)}
    assert len(theirs_grad) == len(ours_grad) == sum(p.requires_grad for p in theirs.parameters())
    optimizers = [torch.optim.AdamW(ps, lr=lr, weight_decay=0.01) for ps in (ours_grad, theirs_grad)]
    for step in range(steps):
        losses = []
        for each, optimizer in zip((model, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            output = each(**batch)
            output.loss.backward()
            losses.append((output.logits.detach(), float(output.loss.detach())))
        if step == 0:
            close(losses[0][0], losses[1][0])
            for label, p, q in same:
                if p.requires_grad:
                    assert p.grad.any(), label
                    close(p.grad, q.grad, label)
        assert abs(losses[0][1] - losses[1][1]) < 1e-5 * max(1, losses[1][1])
        for optimizer in optimizers:
            optimizer.step()
    for label, p, q in same:
        close(p.detach(), q.detach(), label)


def close(ours, theirs, label=""):
    """To 1e-5 of the largest (fp32)."""
    atol = 1e-5 * max(float(theirs.abs().max()), 1e-3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda text: f"{label}: {text}")
