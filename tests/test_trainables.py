"""The trainables' axis: gathering changes nothing anyone can see, pieces cover it once, and moved models are found again."""

from __future__ import annotations

import copy

import accelerate
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build
from torch import nn

from zo_opt import MeZO, ZOError
from zo_opt.queries import trainables
from zo_opt.queries.trainables import Trainables

shapes_of_parameters = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6)


def parameters_of(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def net_of(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2)).to(dtype)


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def not_gathered(monkeypatch):
    monkeypatch.setattr(Trainables, "SMALL", 0)


# --- gathering ---


@settings(deadline=None)
@given(shapes=shapes_of_parameters)
def test_gathering_keeps_values_shapes_and_identity(shapes):
    parameters = parameters_of(shapes)
    ids, before = [id(p) for p in parameters], copies(parameters)
    ours = Trainables(parameters)
    assert ours.flat is not None
    assert [id(p) for p in ours.parameters] == ids
    assert same(parameters, before)
    assert all(p.is_leaf and p.requires_grad and p.is_contiguous() and p.dtype == torch.float32 for p in parameters)
    assert ours.total == len(ours.flat) == sum(b.numel() for b in before)
    assert torch.equal(ours.flat, torch.cat([b.flatten() for b in before]))
    for i, p in enumerate(parameters):
        assert ours.index[id(p)] == i
        assert torch.equal(ours.memory(i), before[i].flatten())
        ours.memory(i).fill_(i)
        assert torch.equal(ours.flat[ours.starts[i] :][: ours.sizes[i]], torch.full((ours.sizes[i],), float(i)))
        assert (p == i).all()


def test_writing_to_a_parameter_writes_to_the_buffer_and_back():
    net = net_of()
    ours = Trainables(list(net.parameters()))
    with torch.no_grad():
        net[0].bias.fill_(7)
        assert (ours.flat[ours.starts[1] : ours.starts[2]] == 7).all()
        ours.flat.zero_()
    assert all((p == 0).all() for p in net.parameters())


def test_gathering_twice_is_harmless():
    net = net_of()
    before = copies(net.parameters())
    first, second = (Trainables(list(net.parameters())) for _ in range(2))
    assert same(net.parameters(), before)
    assert second.is_current(list(net.parameters()))
    if not first.is_current(list(net.parameters())):
        first.flat.zero_()
        assert same(net.parameters(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_gathered_parameters(dtype, tmp_path):
    """Every way of saving writes all of them, each with its own size."""
    net = net_of(dtype)
    expected = {name: p.detach().clone() for name, p in net.state_dict().items()}
    Trainables(list(net.parameters()))

    def check(loaded):
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())

    safetensors.torch.save_file(net.state_dict(), tmp_path / "file.safetensors")
    check(safetensors.torch.load_file(tmp_path / "file.safetensors"))
    safetensors.torch.save_model(net, tmp_path / "model.safetensors")
    check(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    accelerate.Accelerator(cpu=True).save_model(net, tmp_path / "accelerate")
    check(safetensors.torch.load_file(tmp_path / "accelerate" / "model.safetensors"))
    torch.save(net.state_dict(), tmp_path / "all.pt")
    check(torch.load(tmp_path / "all.pt", weights_only=True))


def test_saving_a_part_does_not_write_the_whole(tmp_path):
    parameters = parameters_of([(200, 500), (3,)])
    Trainables(parameters)
    torch.save(parameters[1], tmp_path / "part.pt")
    assert (tmp_path / "part.pt").stat().st_size < 10_000


def test_save_pretrained(tmp_path):
    """With tied weights, and with some parameters frozen."""
    model = build("gpt2")
    expected = {name: p.clone() for name, p in model.state_dict().items()}
    Trainables(list(model.transformer.h.parameters()))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_load_state_dict_writes_into_the_buffer():
    net, other = net_of(), net_of()
    ours = Trainables(list(net.parameters()))
    with torch.no_grad():
        other[0].weight.mul_(3)
    net.load_state_dict(other.state_dict())
    assert ours.is_current(list(net.parameters()))
    assert torch.equal(ours.memory(0), other[0].weight.detach().flatten())


def test_a_deep_copy_has_memory_of_its_own():
    net = net_of()
    ours = Trainables(list(net.parameters()))
    twin = copy.deepcopy(net)
    before = copies(net.parameters())
    ours.flat.zero_()
    assert same(twin.parameters(), before)
    theirs = Trainables(list(twin.parameters()))
    assert theirs.flat is not None
    assert same(twin.parameters(), before)


def test_gradients_flow_through_gathered_parameters():
    net, plain = net_of(), net_of()
    Trainables(list(net.parameters()))
    for each in (net, plain):
        each(torch.ones(3, 6)).square().sum().backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    assert same(net.parameters(), plain.parameters())


def test_large_ones_stay_where_they_are(monkeypatch):
    net = net_of()
    monkeypatch.setattr(Trainables, "SMALL", sum(p.numel() for p in net.parameters()) - 1)
    addresses = [p.data_ptr() for p in net.parameters()]
    ours = Trainables(list(net.parameters()))
    assert (ours.flat, ours.small) == (None, False)
    assert [p.data_ptr() for p in net.parameters()] == addresses


def test_one_parameter_stays_where_it_is():
    parameter = nn.Parameter(torch.randn(3, 4))
    address = parameter.data_ptr()
    ours = Trainables([parameter])
    assert parameter.data_ptr() == address == ours.flat.data_ptr()


def several_dtypes():
    return [*parameters_of([(4, 3)]), *parameters_of([(5,)], torch.bfloat16), *parameters_of([(2, 2)], torch.float64)]


def several_devices():
    return [*parameters_of([(4, 3)]), nn.Parameter(torch.empty(5, device="meta"))]


def overlapping():
    memory = torch.linspace(-1, 1, 20)
    return [nn.Parameter(memory[:12].view(4, 3)), nn.Parameter(memory[9:])]


def the_same_memory():
    first = nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))
    return [first, nn.Parameter(first.data.view(3, 4))]


def shared_between_processes():
    return [nn.Parameter(p.detach().share_memory_()) for p in parameters_of([(4, 3), (5,)])]


class Fancy(torch.Tensor):
    pass


def subclasses():
    return [nn.Parameter(torch.randn(4, 3).as_subclass(Fancy)), nn.Parameter(torch.randn(5))]


ODD = [several_dtypes, shared_between_processes, subclasses]


@pytest.mark.parametrize("make", [*ODD, several_devices, overlapping, the_same_memory])
def test_what_cannot_be_gathered_is_left_alone(make):
    parameters = make()
    addresses = [p.data_ptr() for p in parameters]
    ours = Trainables(parameters)
    assert ours.small
    assert ours.flat is None
    assert [p.data_ptr() for p in parameters] == addresses
    assert ours.is_current(parameters)


@pytest.mark.parametrize("make", ODD)
def test_what_cannot_be_gathered_is_tuned(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parameters = make()
    before = copies(parameters)
    optimizer = MeZO(parameters, lr=0.005, zo_eps=0.05, seed=1)

    @torch.no_grad()
    def loss():
        return sum((p.double() - 0.7).square().sum() for p in parameters)

    start = float(loss())
    optimizer.estimate(loss)
    assert same(parameters, before)
    optimizer.step()
    for _ in range(150):
        optimizer.step(loss)
    assert float(loss()) < 0.3 * start


def frozen_twin(parameter):
    return nn.Parameter(parameter.data, requires_grad=False)


@pytest.mark.parametrize("look", [torch.Tensor.detach, frozen_twin, lambda p: p.detach().numpy()], ids=["alias", "frozen twin", "numpy"])  # fmt: skip
@pytest.mark.parametrize("small", [True, False])
def test_memory_that_others_look_at_stays_theirs(look, small, monkeypatch):
    """A head tied by ``.data``, a view taken before the first step: they must go on seeing the weights."""
    if not small:
        not_gathered(monkeypatch)
    net = net_of()
    view = look(net[3].weight)
    optimizer = MeZO(net.parameters(), lr=0.1, zo_eps=0.05)
    seen = set()

    def loss():
        seen.add(float(view.sum()))
        return float((net[2].weight.detach() ** 2).sum()) + float((view**2).sum())

    optimizer.step(loss)
    assert torch.equal(torch.as_tensor(view), net[3].weight.detach())
    assert len(seen) > 1


def test_a_parameter_that_is_not_contiguous_is_refused():
    with pytest.raises(ZOError, match="contiguous"):
        Trainables([nn.Parameter(torch.ones(3, 4).T)])


# --- moved models ---

MOVES = {
    "to bfloat16": lambda net: net.to(torch.bfloat16),
    "to float64": lambda net: net.double(),
    "one parameter's data replaced": lambda net: setattr(net[0].weight, "data", torch.ones(8, 6)),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("small", [True, False])
def test_a_moved_model_is_found_again(move, small, monkeypatch):
    if not small:
        not_gathered(monkeypatch)
    net = net_of()
    optimizer = MeZO(net.parameters(), lr=0.05, zo_eps=0.05, module=net)
    x = torch.ones(3, 6)

    def loss(b):
        return net(b.to(net[0].weight.dtype)).double().square().mean()

    optimizer.step(loss, x)
    first = optimizer.trainables()
    assert optimizer.trainables() is first
    MOVES[move](net)
    moved, dtypes = copies(net.parameters()), [p.dtype for p in net.parameters()]
    assert first.is_current(list(net.parameters())) is False
    optimizer.estimate(loss, x)
    assert same(net.parameters(), moved)
    assert [p.dtype for p in net.parameters()] == dtypes
    optimizer.step()
    assert not same(net.parameters(), moved)
    if small:
        assert optimizer.trainables() is not first
        assert optimizer.trainables().flat.dtype == dtypes[0]


def test_parameters_that_come_and_go():
    parameters = parameters_of([(6,), (2, 3)])
    optimizer = MeZO(parameters, lr=0.05)
    assert optimizer.trainables().total == 12
    parameters[0].requires_grad_(False)
    assert optimizer.trainables().total == 6
    parameters[0].requires_grad_(True)
    assert optimizer.trainables().total == 12
    optimizer.add_param_group({"params": parameters_of([(4,)])})
    assert optimizer.trainables().shapes == ((6,), (2, 3), (4,))


# --- pieces and spread ---


@settings(deadline=None)
@given(shapes=shapes_of_parameters, small=st.booleans(), chunk=st.integers(1, 40), data=st.data())
def test_pieces_cover_the_axis_once_and_never_mix_labels(shapes, small, chunk, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainables, "CHUNK", chunk)
        patch.setattr(Trainables, "SMALL", (1 << 23) * small - (not small))
        parameters = parameters_of(shapes)
        ours = Trainables(parameters)
        labels = data.draw(st.none() | st.lists(st.sampled_from("ab"), min_size=len(shapes), max_size=len(shapes)))
        owner = [i for i, p in enumerate(parameters) for _ in range(p.numel())]
        axis = torch.cat([p.detach().flatten() for p in parameters])
        position = 0
        for piece in ours.pieces(labels):
            assert piece.start == position < piece.stop <= ours.total
            assert piece.stop - piece.start <= chunk
            assert torch.equal(piece.values, axis[piece.start : piece.stop])
            met = owner[piece.start : piece.stop]
            if labels is not None:
                assert {labels[i] for i in met} == {labels[piece.parameter]}
            if not small:
                assert set(met) == {piece.parameter}
            position = piece.stop
            piece.values.zero_()  # the trainables' own memory
        assert position == ours.total
        assert all((p == 0).all() for p in parameters)


def test_gathered_neighbours_are_one_piece():
    """Hundreds of small tensors cost one operation."""
    ours = Trainables(parameters_of([(3, 2)] * 300))
    assert [(p.start, p.stop) for p in ours.pieces()] == [(0, 1800)]
    assert len(list(ours.pieces(["a"] * 100 + ["b"] * 200))) == 2


@settings(deadline=None)
@given(shapes=shapes_of_parameters, data=st.data())
def test_spread(shapes, data):
    ours = Trainables(parameters_of(shapes))
    values = torch.arange(1.0, len(shapes) + 1)
    whole = torch.cat([torch.full(p.shape, v).flatten() for p, v in zip(ours.parameters, values.tolist(), strict=True)])
    ranges = st.tuples(*[st.integers(0, ours.total)] * 2).map(sorted).filter(lambda b: b[0] < b[1])
    start, stop = data.draw(ranges if ours.total else st.just((0, 0)))
    if start < stop:
        assert torch.equal(ours.spread(values, start, stop), whole[start:stop])


@given(shapes=shapes_of_parameters, rows=st.integers(0, 3))
def test_split(shapes, rows):
    ours = Trainables(parameters_of(shapes))
    matrix = torch.arange(float(rows * ours.total)).view(rows, ours.total)
    parts = ours.split(matrix)
    assert [tuple(p.shape) for p in parts] == [(rows, *s) for s in shapes]
    assert torch.equal(
        torch.cat([p.reshape(rows, size) for p, size in zip(parts, ours.sizes, strict=True)], dim=1), matrix
    )
