import copy
import itertools
import math

import pytest
import torch
from torch import nn

from remanence.compress.layout import Layout, layout_of
from remanence.compress.modules import lookup
from remanence.compress.modules.execution import _LiveBytes, choose_modes, set_mode
from remanence.compress.modules.replace import float_copy, quantised_layers, replace_layers
from remanence.compress.quantised import Quantised
from remanence.errors import InputError

GRID = [
    nn.Conv2d(12, 16, k, stride=s, padding=p, dilation=d, groups=g)
    for k, s, p, d, g in itertools.product((1, 3), (1, 2), (0, 2), (1, 2), (1, 3))
    if 16 % g == 0
] + [
    nn.Conv2d(12, 15, (3, 2), stride=(2, 1), padding=(0, 1), groups=3, bias=False),
    nn.Conv2d(12, 16, 3, padding="same", dilation=2, padding_mode="reflect"),
    nn.Conv2d(12, 16, 3, stride=2, padding=1, padding_mode="circular"),
    nn.Conv2d(12, 24, 3, padding=1, groups=12),
    nn.Conv1d(12, 40, 5, stride=3, padding=2),
    nn.Conv3d(4, 6, (2, 1, 3), padding=(1, 0, 1), groups=2, dilation=(1, 1, 2)),
    nn.Linear(24, 300),
    nn.Linear(24, 10, bias=False),
    nn.Embedding(50, 12, padding_idx=4),
]


def quantise(model, codewords=16, blocks=(4, 3, 2, 1)):
    layers = {}
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if layout := layout_of(module):
            size = next(d for d in blocks if layout.row_length % d == 0)
            shape = (layout.rows, layout.row_length // size)
            codes = torch.randint(codewords, shape, generator=generator)
            book = torch.randn(codewords, size, generator=generator)
            layers[name] = Quantised(layout, codes, book / layout.row_length**0.5)
    return replace_layers(model, layers).eval()


def input_of(module):
    torch.manual_seed(0)
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (3, 5))
    if isinstance(module, nn.Linear):
        return torch.randn(3, 41, module.in_features)
    return 1 + torch.randn(2, module.in_channels, *(13, 14, 9)[: len(module.kernel_size)])


def assert_close(ours, dense):
    assert ours.shape == dense.shape
    assert (ours - dense).abs().max() <= 1e-5 * dense.abs().max()


@pytest.mark.parametrize("module", GRID, ids=repr)
@pytest.mark.parametrize(("codewords", "blocks"), [(16, (3, 2, 1)), (300, (9, 4, 6, 1))])
def test_lookup_equals_the_float_layer(module, codewords, blocks, monkeypatch):
    model = quantise(nn.Sequential(copy.deepcopy(module)), codewords, blocks)
    layer, plain, x = model[0], float_copy(model), input_of(module)
    inputs = [x]
    if x.dim() == 4:
        inputs += [x[0], x.contiguous(memory_format=torch.channels_last)]  # no batch axis; NHWC
    with torch.no_grad():
        expected = [plain(each) for each in inputs]
        assert layer(x[:0]).shape == plain(x[:0]).shape
        # A weight that is decoded is wrong from here on.
        monkeypatch.setattr(type(layer), "decode", lambda _: torch.full(layer.layout.shape, 1e9))
        for tile, table in ((64, 2**20), (5, 5 * 4 * codewords * 2)):  # tiles and passes with rests
            monkeypatch.setattr(lookup, "TILE", tile)
            monkeypatch.setattr(lookup, "TABLE_BYTES", table)
            assert set_mode(model, {"0": "lookup"}) == {"0": "lookup"}
            for each, wanted in zip(inputs, expected, strict=True):
                assert_close(model(each), wanted)
    if not isinstance(module, nn.Embedding):
        assert len(layer.bags().passes) == -(-layer.codes.shape[1] // 2)


def test_lookup_sums_what_the_definition_says():
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(7, (6, 5), generator=generator)
    book = torch.randn(7, 2, generator=generator)
    x = torch.randn(2, 10, 3, generator=generator)
    out = lookup.look_up(x, lookup.bags(codes, 7, groups=2), book)
    for o, p in itertools.product(range(6), range(3)):
        column = x[o // 3, :, p]
        expected = sum(book[codes[o, b]] @ column[2 * b : 2 * b + 2] for b in range(5))
        assert math.isclose(out[o, p], expected, rel_tol=1e-5, abs_tol=1e-6)


def test_lookup_memory_is_one_table_however_long_the_input():
    layer = quantise(nn.Sequential(nn.Linear(256, 512)), 256, (8,))[0]
    layer.mode = "lookup"
    extra = []
    for length in (1_000, 8_000):
        x = torch.randn(length, 256)
        layer(torch.zeros(1, 256))
        with torch.no_grad(), _LiveBytes() as live:
            layer(x)
        extra.append(live.peak - 2 * 4 * length * 512)  # the product, and with the bias
    assert max(extra) < 3 * lookup.TABLE_BYTES
    assert layer.kept_bytes() == 4 * layer.codes.numel()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(256, 512),
    )


def test_modes_agree_and_follow_the_codebook():
    model, x = quantise(network()), torch.randn(2, 3, 4, 4)
    for _ in range(2):
        plain = float_copy(model)
        for mode in ("dense", "lazy", "lookup"):
            found = set_mode(model, mode)
            assert found["1"] == ("lazy" if mode == "lookup" else mode)
            with torch.no_grad():
                assert_close(model(x), plain(x))
                assert_close(model(x), plain(x))
                assert [k for k in model.state_dict() if "dense" in k or "kept" in k] == []
                kept = {n: layer.kept_bytes() for n, layer in quantised_layers(model).items()}
                if mode == "dense":
                    assert kept == {"0": 4 * 216, "1": 4 * 128, "3": 4 * 256 * 512}
                if mode == "lazy":
                    assert set(kept.values()) == {0}
                for layer in quantised_layers(model).values():
                    layer.codebook.mul_(1.1)
                assert not torch.equal(model(x), plain(x))
                for layer in quantised_layers(model).values():
                    layer.codebook.mul_(1 / 1.1)
        with torch.no_grad():
            model[0].codes.copy_(model[0].codes.flip(0))  # the table entries must follow


def test_lookup_gives_way_where_it_does_not_hold():
    model, x = quantise(network()), torch.randn(2, 3, 4, 4)
    plain = float_copy(model)
    set_mode(model, "lookup")
    model(x).sum().backward()  # gradients flow
    plain(x).sum().backward()
    torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad)
    assert model[0].codebook.grad is not None
    with torch.no_grad():
        assert torch.equal(model.double()(x.double()), plain.double()(x.double()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.float()(x).dtype == torch.bfloat16


def test_bad_modes_are_refused():
    model = quantise(network())
    with pytest.raises(InputError, match=r"1: lookup does not apply, a transposed.*dense or lazy"):
        set_mode(model, {"0": "lazy", "1": "lookup"})
    assert model[0].mode == "dense"  # nothing was changed
    with pytest.raises(InputError, match="mode 'fast' is unknown"):
        set_mode(model, "fast")
    with pytest.raises(InputError, match="9: the network has no such"):
        set_mode(model, {"9": "lazy"})
    with pytest.raises(InputError, match="no layer of the network is quantised"):
        choose_modes(network(), torch.zeros(1))
    with pytest.raises(InputError, match="slack -1"):
        choose_modes(model, torch.zeros(1), slack=-1)


def test_choice_is_the_least_memory_among_the_quick():
    model, x = quantise(network()), torch.randn(2, 3, 4, 4)
    model.train()
    model[0].eval()
    flags = [m.training for m in model.modules()]
    plain, keys = float_copy(model), set(vars(model[0]))
    chosen = choose_modes(model, x, slack=0.5, seconds=0.002)
    assert [m.training for m in model.modules()] == flags
    assert set(vars(model[0])) == keys
    assert set(chosen) == {"0", "1", "3"}
    assert set(chosen["1"].costs) == {"dense", "lazy"}
    assert set(chosen["3"].costs) == {"dense", "lazy", "lookup"}
    for name, choice in chosen.items():
        layer = model.get_submodule(name)
        assert layer.mode == choice.mode
        quickest = min(cost.seconds for cost in choice.costs.values())
        assert choice.costs[choice.mode].seconds <= 1.5 * quickest
        for cost in choice.costs.values():
            quick = cost.seconds <= 1.5 * quickest
            assert not quick or cost.kept >= choice.costs[choice.mode].kept
        size = 4 * math.prod(layer.layout.shape)
        dense, lazy = choice.costs["dense"], choice.costs["lazy"]
        assert (dense.kept, lazy.kept) == (size, 0)
        assert lazy.working >= dense.working + size - 8  # the output of both, and the weight
        assert all(cost.seconds > 0 for cost in choice.costs.values())
    with torch.no_grad():
        assert_close(model.eval()(x), plain.eval()(x))


def test_weights_that_other_modules_read_stay_dense():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    model.self_attn.out_proj.weight.requires_grad_(False)
    layout = Layout("linear", (48, 16))
    codes = torch.randint(16, (48, 4))
    replace_layers(model, {"self_attn.in_proj": Quantised(layout, codes, torch.randn(16, 4))})
    chosen = choose_modes(model, {"src": torch.randn(2, 3, 16)}, seconds=0.001)
    assert chosen["self_attn.in_proj"].mode == "dense"
    assert not chosen["self_attn.in_proj"].costs


def test_live_bytes_counts_storages_once():
    with _LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[1:]
        del a
        c = b + 1
        del b, c
        torch.zeros(500)
    assert live.peak == 4 * (1000 + 900)
    assert live._now == 0
