import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from remanence.compress.layout import Layout, layout_of
from remanence.compress.modules.replace import (
    PQConv2d,
    PQEmbedding,
    PQLinear,
    PQMultiheadAttention,
    float_copy,
    quantised_layers,
    replace_layers,
)
from remanence.compress.quantised import Quantised
from remanence.errors import InputError

CONVOLUTIONS = [
    nn.Conv1d(6, 8, 5, padding="same"),
    nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"),
    nn.Conv2d(6, 8, 1, bias=False),
    nn.Conv3d(4, 6, (1, 3, 2), padding=(0, 1, 1), groups=2, padding_mode="circular"),
    nn.ConvTranspose1d(6, 9, 4, stride=2, padding=1, groups=3),
    nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1, groups=2, dilation=2),
    nn.ConvTranspose3d(4, 6, 2),
]


def random_codes(layout, block, codewords, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.rows, layout.row_length // block)
    codes = torch.randint(codewords, shape, generator=generator)
    codes.view(-1)[-1] = codewords - 1
    return Quantised(layout, codes, torch.randn(codewords, block, generator=generator))


def block_of(layout):
    return next(d for d in (4, 3, 2, 1) if layout.row_length % d == 0)


def quantise_all(model, codewords=16):
    """Random codes for every layer, the packed projection of attention among them."""
    layers = {}
    for name, module in model.named_modules():
        if layout := layout_of(module):
            layers[name] = random_codes(layout, block_of(layout), codewords, len(layers))
        if isinstance(module, nn.MultiheadAttention):
            layout = Layout("linear", tuple(module.in_proj_weight.shape))
            layers[f"{name}.in_proj"] = random_codes(layout, 4, codewords, len(layers))
    return replace_layers(model, layers), layers


def input_of(module, seed=0):
    torch.manual_seed(seed)
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (3, 5))
    if isinstance(module, nn.Linear):
        return torch.randn(3, 7, module.in_features)
    return torch.randn(2, module.in_channels, *(9, 10, 11)[: len(module.kernel_size)])


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=repr)
def test_weight_is_direct_indexing_and_the_forward_torchs_own(module):
    module = copy.deepcopy(module)
    layout, x = layout_of(module), input_of(module)
    block = block_of(layout)
    quantised = random_codes(layout, block, 16)
    expected = torch.empty(module.weight.shape)
    taps, outputs = module.weight[0, 0].numel(), module.out_channels // module.groups
    flat = expected.view(*expected.shape[:2], taps)
    for o in range(layout.rows):
        for r in range(layout.row_length):
            value = quantised.codebook[quantised.codes[o, r // block], r % block]
            if layout.kind == "conv":
                flat[o, r // taps, r % taps] = value
            else:
                group, row = divmod(o, outputs * taps)
                flat[group * layout.row_length + r, row // taps, row % taps] = value
    twin = copy.deepcopy(module)
    twin.weight.data.copy_(expected)
    pq = replace_layers(nn.Sequential(module), {"0": quantised})[0]
    assert pq is module  # every reference to it holds
    assert isinstance(pq, type(twin))
    assert pq.extra_repr() == twin.extra_repr()
    assert torch.equal(pq.weight, expected)
    assert torch.equal(pq(x), twin(x))


def test_linear_and_embedding_decode():
    model = nn.ModuleDict({"e": nn.Embedding(50, 12, padding_idx=3), "l": nn.Linear(12, 300)})
    model, layers = quantise_all(model)
    assert isinstance(model["e"], PQEmbedding)
    assert isinstance(model["l"], PQLinear)
    tokens = torch.tensor([[3, 49]])
    rows = layers["e"].codebook[layers["e"].codes[tokens]].flatten(-2)
    assert torch.equal(model["e"](tokens), rows)
    weight = layers["l"].codebook[layers["l"].codes].reshape(300, 12)
    assert torch.equal(model["l"](rows), F.linear(rows, weight, model["l"].bias))


@pytest.mark.parametrize("codewords", [2, 256, 257, 40_000])
def test_codes_never_wrap(codewords):
    module = nn.Sequential(nn.Linear(8, 6))
    quantised = random_codes(layout_of(module[0]), 4, codewords)
    replace_layers(module, {"0": quantised})
    assert module[0].codes.dtype == (torch.uint8 if codewords <= 256 else torch.int32)
    assert torch.equal(module[0].weight, quantised.weight())
    module.half().float()
    assert torch.equal(module[0].codes.long(), quantised.codes)


def test_gradient_of_a_codeword_is_the_sum_over_its_blocks():
    model, layers = quantise_all(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)))
    codes, x = layers["0"].codes, torch.randn(2, 4, 5, 5)
    weight = model[0].weight.detach().clone().requires_grad_()
    F.conv2d(x, weight, model[0].bias, groups=2).square().sum().backward()
    model.eval()(x).square().sum().backward()  # in evaluation too, where a weight could be kept
    blocks = weight.grad.reshape(*codes.shape, -1)
    summed = torch.zeros_like(layers["0"].codebook)
    summed.index_add_(0, codes.flatten(), blocks.flatten(0, 1))
    torch.testing.assert_close(model[0].codebook.grad, summed)


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("mode", ["dense", "lazy", "lookup"])
def test_attention_agrees_between_torchs_fast_path_and_the_slow_one(mode):
    model, _ = quantise_all(encoder())
    plain = float_copy(model)
    for layer in quantised_layers(model).values():
        layer.mode = mode
    attention = model.layers[0].self_attn
    assert isinstance(attention, PQMultiheadAttention)
    x, mask = torch.randn(3, 5, 16), torch.tensor([[False] * 4 + [True]]).expand(3, -1)
    with torch.no_grad():
        fast, expected = (m(x, src_key_padding_mask=mask) for m in (model, plain))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = model(x, src_key_padding_mask=mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert torch.equal(fast, expected)
        torch.testing.assert_close(slow[:, :4], expected[:, :4], rtol=1e-4, atol=1e-5)
    graded = model(x)  # with gradients
    graded.sum().backward()
    assert attention.in_proj.codebook.grad.abs().sum() > 0


def test_attention_of_different_widths_stays_float():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4))
    wanted = random_codes(Layout("linear", (24, 8)), 4, 16)
    with pytest.raises(InputError, match="keep them float"):
        replace_layers(model, {"0.in_proj": wanted})


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head, self.twin = nn.Linear(8, 20, bias=False), nn.Linear(8, 8)
        self.head.weight, self.twin.weight = self.embed.weight, self.body.weight
        self.again = self.body

    def forward(self, tokens):
        return self.head(self.again(self.twin(self.body(self.embed(tokens)))))


def assert_tied(model):
    for a, b in ((model.embed, model.head), (model.body, model.twin)):
        assert a.codes is b.codes
        assert a.codebook is b.codebook
    assert model.again is model.body


def test_ties_are_kept_by_identity():
    model, tokens = Tied(), torch.arange(6)
    layers = {
        "head": random_codes(Layout("linear", (20, 8)), 4, 16),
        "body": random_codes(Layout("linear", (8, 8)), 4, 16),
    }
    other = random_codes(Layout("embedding", (20, 8)), 4, 16, seed=9)
    with pytest.raises(InputError, match="give codes for one of them"):
        replace_layers(model, layers | {"embed": other})
    replace_layers(model, layers)
    assert_tied(model)
    assert len(list(model.parameters())) == 2 + 2  # two codebooks, two biases
    copied = copy.deepcopy(model)
    assert_tied(copied)
    before = copied.embed.codes
    assert_tied(copied._apply(torch.clone))  # as a move to another device
    assert copied.embed.codes is not before
    assert_tied(copied._apply(torch.clone))
    assert_tied(model.double())
    plain = float_copy(model)
    assert plain.embed.weight is plain.head.weight
    assert plain.body.weight is plain.twin.weight
    assert torch.equal(plain(tokens), model(tokens))
    assert type(plain.embed) is nn.Embedding


def test_a_weight_shared_with_no_layer_is_refused():
    model = nn.Module()
    model.l, model.alias = nn.Linear(4, 4), None
    model.alias = model.l.weight
    with pytest.raises(InputError, match=r"shares its weight with .*alias"):
        quantise_all(model)
    assert type(model.l) is nn.Linear


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 10)
    )


def test_state_dict_round_trip_is_strict():
    model, _ = quantise_all(network())
    x = torch.randn(2, 4, 3, 3)
    other = quantise_all(network())[0].eval()
    with torch.no_grad():
        model[0].codebook.mul_(2)
        model[3].codes.copy_(model[3].codes.flip(0))
        other(x)  # keeps weights that must not outlive what is loaded
    state = model.state_dict()
    assert set(state) >= {"0.codes", "0.codebook", "3.codes", "3.codebook"}
    assert not any(key.endswith(".weight") and key[0] in "03" for key in state)
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(x), model.eval()(x))
    del state["0.codes"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.codes"):
        other.load_state_dict(state)


def test_kept_weight_follows_the_codebook_and_is_not_in_the_state():
    model, _ = quantise_all(network().eval())
    layer, before = model[3], set(model.state_dict())
    with torch.no_grad():
        first = layer.weight
        assert layer.weight is first  # decoded once
        layer.codebook.mul_(2)
        assert torch.equal(layer.weight, 2 * first)
        layer.codes.fill_(0)
        assert torch.equal(layer.weight[3], layer.codebook[0].repeat(72 // 4))
        assert layer.weight is not first
        layer.codebook.data = layer.codebook.data + 1
        assert torch.equal(layer.weight[0, :4], layer.codebook[0])
        assert set(model.state_dict()) == before
        assert layer.kept_bytes() == 4 * 720
        layer.train()
        assert layer.kept_bytes() == 0
        assert layer.weight is not layer.weight
        assert layer.kept_bytes() == 0
    layer.eval()
    assert layer.weight.requires_grad  # with gradients on, it is decoded
    with torch.inference_mode():
        layer(torch.randn(1, 72))
    layer.codebook.requires_grad_(False)
    x = torch.randn(1, 72, requires_grad=True)
    layer(x).sum().backward()  # what inference mode kept serves here as well
    assert layer.kept_bytes() == 4 * 720
    assert torch.equal(layer.half().weight, layer.codebook[layer.codes.long()].reshape(10, 72))


def test_functional_call_and_per_sample_gradients():
    model, layers = quantise_all(nn.Sequential(nn.Linear(8, 5)))
    model.eval()
    x = torch.randn(3, 8)
    book = torch.randn(16, 4)

    def loss(codebook, row):
        values = {"0.codebook": codebook}
        return torch.func.functional_call(model, values, (row,)).square().sum()

    with torch.no_grad():
        model(x)
        weight = book[layers["0"].codes].reshape(5, 8)
        expected = F.linear(x, weight, model[0].bias).square().sum()
        torch.testing.assert_close(loss(book, x), expected)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(book, x)
    torch.testing.assert_close(each.sum(0), torch.func.grad(loss)(book, x))


def test_exponential_average_and_deepcopy():
    model, layers = quantise_all(network())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        model[0].codebook.add_(2)
    average.update_parameters(model)
    torch.testing.assert_close(average.module[0].codebook, layers["0"].codebook + 1)
    assert torch.equal(average.module[0].codes, model[0].codes)
    assert average.module[0].codes is not model[0].codes


def test_distributed_data_parallel(tmp_path: Path):
    model, _ = quantise_all(network())
    x = torch.randn(2, 4, 3, 3)
    expected = model(x)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(x).sum().backward()
        assert model[0].codebook.grad is not None
        torch.testing.assert_close(wrapped(x), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_traces_as_one_graph():
    model, _ = quantise_all(network().eval())
    x = torch.randn(2, 4, 3, 3)
    for mode in ("dense", "lazy", "lookup"):
        for layer in quantised_layers(model).values():
            layer.mode = mode
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-3)
            model[0].codebook.mul_(1.5)  # a graph must not have kept a weight
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-3)
        compiled(x).sum().backward()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-3)


def test_subclasses_keep_their_own_forward():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight / self.weight.std(), self.bias)

    model = nn.Sequential(Standardised(4, 8, 3)).eval()
    quantise_all(model)
    assert isinstance(model[0], PQConv2d)
    assert isinstance(model[0], Standardised)
    plain, x = float_copy(model), torch.randn(1, 4, 5, 5)
    assert type(plain[0]) is Standardised
    for mode in ("dense", "lazy", "lookup"):
        model[0].mode = mode
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))


def test_hooks_attributes_and_flags_survive():
    module, seen = nn.Linear(8, 4), []
    module.register_forward_hook(lambda *_: seen.append(1))
    module.note = "kept"
    module.weight.requires_grad_(False)
    model, _ = quantise_all(nn.Sequential(module))
    model(torch.randn(1, 8))
    assert seen
    assert module.note == "kept"
    assert not module.codebook.requires_grad
    plain = float_copy(model)
    assert [name for name, _ in plain.named_parameters()] == ["0.weight", "0.bias"]
    assert not plain[0].weight.requires_grad
    assert vars(plain[0]).keys() == vars(nn.Linear(8, 4)).keys() | {"note"}


def test_bad_replacements_name_the_layer():
    model = network()
    good = random_codes(layout_of(model[3]), 4, 16)
    linear = good.layout
    cases = {
        "no such layer": {"4": good},
        "codes are for": {"0": good},
        "no weight of its own": {"2": good},
        "shape": {"3": Quantised(linear, good.codes[:, :-1], good.codebook)},
        "codes run from": {"3": Quantised(linear, good.codes, good.codebook[:-1])},
        "cannot be cut": {"3": Quantised(linear, good.codes, torch.randn(16, 5))},
    }
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for message, layers in cases.items():
        with pytest.raises(InputError, match=message):
            replace_layers(model, layers)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(InputError, match="parametrisation"):
        replace_layers(model, {"0": random_codes(Layout("conv", (8, 4, 3, 3)), 4, 16)})
    replace_layers(model, {"3": good})
    with pytest.raises(InputError, match="quantised already"):
        replace_layers(model, {"3": good})
    assert torch.equal(float_copy(model)[3].bias, before["3.bias"])
