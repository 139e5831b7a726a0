"""Every product with a layer's weight is seen, wherever it is computed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

from remanence.compress.network.layers import find_layers
from remanence.compress.network.recorder import listen
from remanence.compress.network.trace import execution_order, record_inputs, trace
from remanence.errors import InputError


class Block(nn.Module):
    """Registered in another order than it runs, with uses that hooks do not see."""

    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.shortcut = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 5)
        self.unused = nn.Linear(6, 5)

    def forward(self, x):
        y = F.relu(self.norm(self.conv1(x)), inplace=True)
        y = self.conv2(self.conv2(y)) + self.shortcut(x)
        return F.linear(y.mean((2, 3)), self.head.weight, self.head.bias)


def traced(model, batch):
    return trace(model, find_layers(model), batch)


def test_order_is_that_of_execution_and_calls_are_counted():
    torch.manual_seed(0)
    found = traced(Block(), torch.randn(2, 4, 8, 8))
    assert found.order == ("conv1", "conv2", "shortcut", "head")
    assert found.calls["conv2"] == 2
    assert found.inputs["conv1"] != found.inputs["shortcut"]  # conv1 saw x reflected
    assert execution_order(Block(), torch.randn(2, 4, 8, 8)) == list(found.order)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("inference", [False, True])
def test_rows_times_the_weight_are_the_output(mode, inference):
    torch.manual_seed(0)
    model = nn.Conv2d(4, 6, 3, padding=1, stride=2, dilation=2, groups=2, padding_mode=mode)
    x = torch.randn(2, 4, 9, 9)
    layers = find_layers(nn.Sequential(model))
    got = []

    def forward(net, batch):
        with torch.inference_mode(inference):
            return net(batch)

    listen(
        nn.Sequential(model),
        layers,
        x,
        lambda product, _: got.append(product.rows(slice(None), None, None).tolist()),
        forward=forward,
    )
    rows = layers["0"].layout.to_rows(model.weight).reshape(2, 3, -1)
    out = (
        torch.einsum("ngr,gor->ngo", torch.tensor(got[0]), rows)
        .reshape(2, 4, 4, 6)
        .permute(0, 3, 1, 2)
    )
    torch.testing.assert_close(out + model.bias.view(1, -1, 1, 1), model(x))


USES = {
    "module": lambda net, x: net(x),
    "functional": lambda net, x: F.linear(x, net.weight),
    "matmul": lambda net, x: x @ net.weight.t(),
    "left": lambda net, x: (net.weight @ x.flatten(0, 1).t()).t(),
    "batched": lambda net, x: torch.bmm(net.weight.expand(2, 5, 6), x.mT),
    "einsum": lambda net, x: torch.einsum("bnd,od->bno", x, net.weight),
    "vector": lambda net, x: torch.mv(net.weight, x[0, 0]),
}


@pytest.mark.parametrize("use", USES)
def test_a_weight_is_seen_in_whatever_product(use):
    model = nn.Linear(6, 5)
    x = torch.randn(2, 3, 6)
    net = nn.Sequential(model)
    got = []
    listen(
        net,
        find_layers(net),
        x,
        lambda product, _: got.append(product.input.clone()),
        forward=lambda net, batch: USES[use](net[0], batch),
    )
    expected = x[0, :1] if use == "vector" else x.flatten(0, 1)
    assert torch.equal(torch.cat(got), expected)


def test_a_convolution_written_as_unfold_and_product_is_seen():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False))
    x = torch.randn(2, 4, 5, 5)
    got = []
    listen(
        model,
        find_layers(model),
        x,
        lambda product, _: got.append(product.rows(slice(None), None, None)),
        forward=lambda net, x: net[0].weight.flatten(1) @ F.unfold(x, 3),
    )
    torch.testing.assert_close(got[0][:, 0], F.unfold(x, 3).mT.flatten(0, 1))


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_is_seen_with_its_fused_path_off(batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=batch_first)
    fused = torch.backends.mha.get_fastpath_enabled()
    found = traced(model, torch.randn(3, 4, 8))
    assert torch.backends.mha.get_fastpath_enabled() == fused
    prefix = "layers.0."
    assert found.order == tuple(
        prefix + n for n in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    )
    assert not found.partial


def test_cross_attention_uses_parts_of_its_projection():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, memory):
            return self.attend(x, memory, memory)[0]

    found = traced(Cross(), (torch.randn(2, 3, 8), torch.randn(2, 5, 8)))
    assert found.calls["attend.in_proj"] > 1
    assert found.partial == {"attend.in_proj"}


def test_layers_with_the_same_input_are_known():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
            self.gate = nn.Linear(8, 8)

        def forward(self, x):
            out = self.q(x) + self.k(x) + self.v(x)
            return self.gate(x.add_(1)) + out

    found = traced(Attention(), torch.randn(2, 3, 8))
    assert found.inputs["q"] == found.inputs["k"] == found.inputs["v"]
    assert found.inputs["gate"] != found.inputs["q"]  # overwritten in between


def test_a_freed_input_is_not_taken_for_a_later_one_at_its_address():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    found = traced(model, torch.randn(4, 64))
    assert len(set(found.inputs.values())) == 12


def test_the_norm_that_follows_directly_is_found():
    model = Block()
    assert traced(model, torch.randn(2, 4, 8, 8)).norms == {"conv1": model.norm}
    shared = nn.BatchNorm2d(3)
    twice = nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Conv2d(3, 3, 1), shared)
    assert traced(twice, torch.randn(2, 3, 4, 4)).norms == {}


def test_ties_are_one_layer_and_embeddings_are_seen():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    model = Tied()
    layers = find_layers(model)
    assert list(layers) == ["embed"]
    assert layers["embed"].tied == ("head",)
    found = traced(model, torch.tensor([[1, 2]]))
    assert found.calls["embed"] == 2
    assert [g is None for g in found.geometries["embed"]] == [True, False]


def test_a_forward_stops_after_the_last_wanted_product():
    model = Block()
    ran = []
    model.head.register_forward_hook(lambda *_: ran.append(1))
    model.shortcut.register_forward_hook(lambda *_: ran.append(2))
    inputs = record_inputs(model, "conv2", torch.randn(2, 4, 8, 8))
    assert [tuple(x.shape) for x in inputs] == [(2, 6, 8, 8)] * 2
    assert ran == [2]  # by the forward that counted; the second one stopped before
    assert len(record_inputs(model, "head", torch.randn(2, 4, 8, 8), stop=False)) == 1


def test_inputs_are_those_before_an_operation_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(record_inputs(model, "0", x)[0], x)


def test_what_cannot_be_followed_is_named():
    class Standardised(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.lost = nn.Linear(4, 4)

        def forward(self, x):
            return F.conv2d(x, self.conv.weight * 2)

    model = Standardised()
    found = traced(model, torch.randn(1, 3, 5, 5))
    with pytest.raises(InputError, match=r"conv \(its weight goes through aten.mul.*keep it in"):
        found.require(["conv"])
    with pytest.raises(InputError, match="never runs lost; keep"):
        found.require(["lost"])
    with pytest.raises(InputError, match=r"shape \(1, 2, 5, 5\).*\n?") as refused:
        traced(model, torch.randn(1, 2, 5, 5))
    assert "\n" not in str(refused.value)


def test_layers_that_are_no_plain_float_weight_are_refused():
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(InputError, match="0: its weight is computed"):
        find_layers(normed)
    with pytest.raises(InputError, match="0: the layer has no weight yet"):
        find_layers(nn.Sequential(nn.LazyLinear(4)))
    integers = nn.Sequential(nn.Linear(4, 4))
    integers[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="int8"):
        find_layers(integers)


def test_recording_leaves_no_trace():
    model = Block().train()
    model.conv2.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    traced(model, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
