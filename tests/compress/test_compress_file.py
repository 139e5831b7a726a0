import json
import os
import pickle
import zlib
from dataclasses import replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812

from remanence.compress.modules.replace import quantised_layers, replace_layers
from remanence.compress.network.layers import find_layers
from remanence.compress.planning.plan import LayerPlan, Plan, plan
from remanence.compress.planning.size import size
from remanence.compress.quantised import Quantised
from remanence.compress.storage.file import inspect_file, load, save
from remanence.compress.storage.format import digest
from remanence.compress.storage.stored import as_stored
from remanence.errors import InputError


class Net(nn.Module):
    """Every kind of layer, an odd row, a tied weight, norms of all sorts, odd buffers."""

    def __init__(self, tied=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 20, 3, padding=1, groups=2, bias=False)
        self.plain_bn = nn.BatchNorm2d(20, affine=False)
        self.deep = nn.Conv2d(20, 20, 3, groups=20)
        self.up = nn.ConvTranspose2d(20, 24, 2)
        self.batch_only = nn.BatchNorm2d(24, track_running_stats=False)
        self.narrow = nn.Conv2d(24, 5, 1)
        self.wide = nn.Conv2d(5, 64, 1)
        self.embedding = nn.Embedding(64, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.out = nn.Linear(64, 64, bias=False)
        if tied:
            self.out.weight = self.embedding.weight
        self.head = nn.Linear(64, 100)
        self.register_buffer("table", torch.arange(5))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x):
        x = self.deep(self.plain_bn(self.grouped(self.bn(self.stem(x)).relu())))
        x = self.wide(self.narrow(self.up(x).relu())).flatten(2).transpose(1, 2)[:, :8]
        x = x + self.embedding(torch.arange(8, device=x.device))
        return self.head(self.out(self.attention(x, x, x)[0]).relu())


def net(seed=0, **options):
    torch.manual_seed(seed)
    model = Net(**options)
    for norm in (model.bn, model.plain_bn):
        norm.running_mean.normal_()
        norm.running_var.uniform_(1e-6, 4)
    model.plain_bn.running_var[3] = 1e-6
    model.bn.weight.data.normal_()
    return model.eval()


RECIPE = {
    "embedding": {"channels": 4, "codewords": 512},
    "head": {"channels": 4, "codewords": 16},
    "pointwise": {"codewords": 8},
}


def quantise(model, planned, seed=0):
    """Arbitrary codes: this file is about storing them."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in planned.layers:
        shape = layer.layout.rows, layer.layout.row_length // layer.block
        codes = torch.randint(layer.codewords, shape, generator=g)
        codebook = torch.randn(layer.codewords, layer.block, generator=g) / 8
        layers[layer.name] = Quantised(layer.layout, codes, codebook)
    return replace_layers(model, layers)


X = torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


@pytest.fixture
def saved(tmp_path):
    model = net()
    planned = plan(model, RECIPE)
    assert len(planned.layers) == 8
    path = tmp_path / "net.safetensors"
    counted = save(quantise(model, planned), path, architecture={"name": "Net"}, extra={"kl": 0.5})
    return model, path, counted


def test_a_loaded_network_computes_what_was_stored_to_the_bit(saved):
    model, path, _ = saved
    stored = as_stored(model)
    for mode in ("dense", "lazy"):
        loaded = load(path, net(seed=1), mode=mode)
        assert not loaded.training
        torch.testing.assert_close(loaded(X), stored(X), rtol=0, atol=0)
    built = load(path, build=lambda architecture: {"Net": net}[architecture["name"]](seed=2))
    torch.testing.assert_close(built(X), stored(X), rtol=0, atol=0)


def test_storing_changes_a_network_by_float16_rounding_only(saved):
    model, _, _ = saved
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stored = as_stored(model)
    error = (stored(X) - model(X)).norm() / model(X).norm()
    assert 0 < error < 2e-3
    kl = F.kl_div(stored(X).log_softmax(-1), model(X).softmax(-1), reduction="none").sum(-1).mean()
    assert abs(kl) < 1e-5
    assert model.bn.eps == 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_reported_size_is_the_files_and_the_plans(saved):
    _, path, counted = saved
    assert counted.total == path.stat().st_size
    float_model = net()
    predicted = size(
        float_model,
        plan(float_model, RECIPE),
        architecture={"name": "Net"},
        extra={"kl": 0.5},
    )
    assert predicted == counted
    info = inspect_file(path)
    assert info.size == counted
    assert info.architecture == {"name": "Net"}
    assert info.extra == {"kl": 0.5}
    planned = {replace(layer, note="") for layer in plan(float_model, RECIPE).layers}
    assert set(info.layers) == planned
    assert counted.uncompressed == 4 * sum(p.numel() for p in float_model.parameters())
    tensors = load_file(path)
    assert counted.tensors == sum(tensor.nbytes for tensor in tensors.values())
    assert counted.codes == sum(t.nbytes for n, t in tensors.items() if n.endswith(".codes"))


def test_nothing_in_the_file_is_wider_than_it_must_be(saved):
    _, path, _ = saved
    tensors = load_file(path)
    wide = {name for name, tensor in tensors.items() if tensor.dtype.itemsize > 2}
    # Statistics of a norm that cannot be folded, and a table of integers, keep their dtype.
    assert wide == {"plain_bn.running_var", "plain_bn.num_batches_tracked", "table"}
    assert tensors["embedding.codes"].shape == (64, 16)  # 256 codewords, after the bound
    assert tensors["head.codes"].shape == (100 * 16 * 4 // 8,)
    assert tensors["embedding.codes"].dtype == torch.uint8
    assert not {"bn.running_mean", "bn.num_batches_tracked", "scratch", "out.codes"} & set(tensors)


def test_keep_dtype_keeps_it(tmp_path):
    model = net()
    planned = plan(model, RECIPE)
    predicted = size(model, planned, keep_dtype=True)
    counted = save(quantise(model, planned), tmp_path / "f", keep_dtype=True)
    assert counted == predicted
    assert load_file(tmp_path / "f")["stem.weight"].dtype == torch.float32


def test_ties_are_stored_once_and_restored(saved):
    _, path, _ = saved
    assert inspect_file(path).aliases == {"out": "embedding"}
    loaded = load(path, net(seed=1))
    assert loaded.out.codes is loaded.embedding.codes
    assert loaded.out.codebook is loaded.embedding.codebook
    apart = load(path, net(seed=1, tied=False))
    torch.testing.assert_close(apart(X), loaded(X), rtol=0, atol=0)


def test_shared_float_tensors_are_stored_once(tmp_path):
    def build():
        model = nn.Sequential(nn.Linear(64, 64), nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
        model[2].weight = model[1].weight
        return model

    model = build()
    counted = save(quantise(model, plan(model)), tmp_path / "f")
    info = inspect_file(tmp_path / "f")
    assert info.aliases == {"2.weight": "1.weight"}
    assert set(info.kept) == {"0.bias", "1.weight"}
    assert counted.other == 2 * (64 + 50 * 8)
    loaded = load(tmp_path / "f", build())
    assert loaded[2].weight is loaded[1].weight
    torch.testing.assert_close(loaded[1].weight, model[1].weight.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("variance", [1e-12, 1e-6, 1e-3, 1.0, 1e4])
def test_norms_are_folded_with_their_eps(tmp_path, variance):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)).eval()

    model = build()
    model[2].running_var.fill_(variance)
    model[2].running_mean.normal_().mul_(variance**0.5)
    quantise(model, plan(model))
    save(model, tmp_path / "f")
    loaded = load(tmp_path / "f", build())
    assert ((loaded[2].running_var + loaded[2].eps - 1).abs() < 1e-6).all()
    error = (loaded(X) - model(X)).norm() / model(X).norm()
    assert error < 3e-3


def test_a_scale_beyond_float16_stays_float32(tmp_path):
    def build():
        return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64, eps=1e-12)).eval()

    model = build()
    model[1].running_var.fill_(1e-11)
    predicted = size(model, plan(model))
    counted = save(quantise(model, plan(model)), tmp_path / "f")
    assert counted == predicted
    assert load_file(tmp_path / "f")["1.weight"].dtype == torch.float32
    loaded = load(tmp_path / "f", build())
    x = torch.randn(4, 64)
    assert (loaded(x) - model(x)).norm() / model(x).norm() < 1e-3


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])
def test_codebooks_beyond_float16_survive(tmp_path, scale):
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    quantise(model, plan(model))
    model[0].codebook.data *= scale
    save(model, tmp_path / "f")
    loaded = load(tmp_path / "f", nn.Sequential(nn.Linear(64, 64, bias=False)))
    torch.testing.assert_close(loaded[0].weight, model[0].weight, rtol=1e-3, atol=0)
    assert load_file(tmp_path / "f")["0.codebook"].dtype == torch.float16


@pytest.mark.parametrize("codewords", [2, 8, 100, 128, 200, 256, 512, 5000])
def test_any_number_of_codewords_round_trips(tmp_path, codewords):
    model = nn.Sequential(nn.Linear(96, 101))
    layout = find_layers(model)["0"].layout
    codes = torch.randint(codewords, (101, 24))
    codes[0, 0] = codewords - 1
    made = Quantised(layout, codes, torch.randn(codewords, 4).half().float())
    counted = save(replace_layers(model, {"0": made}), tmp_path / "f")
    loaded = load(tmp_path / "f", nn.Sequential(nn.Linear(96, 101)))
    assert torch.equal(quantised_layers(loaded)["0"].codes.long(), codes)
    assert torch.equal(loaded[0].weight, made.weight())
    bits = max((codewords - 1).bit_length(), 1)
    assert counted.codes == (101 * 24 * bits + 7) // 8


def test_equal_networks_give_equal_bytes(tmp_path):
    for name in "ab":
        model = net()
        save(quantise(model, plan(model, RECIPE)), tmp_path / name, extra={"b": 1, "a": [2]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saving_leaves_the_old_file_whole_when_it_fails(saved, tmp_path):
    model, path, _ = saved
    before = path.read_bytes()
    with pytest.raises(InputError, match="plain JSON values"):
        save(model, path, extra={"x": object()})
    model.stem.bias.data[3] = float("nan")
    with pytest.raises(InputError, match=r"stem\.bias holds NaN"):
        save(model, path)
    with pytest.raises(InputError, match="is no folder"):
        save(model, tmp_path / "none" / "x")
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def header_of(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def refuse(path, match):
    model = net(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=match) as error:
        load(path, model)
    assert "\n" not in str(error.value)
    assert not quantised_layers(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_every_edited_tensor_is_found_and_named(saved):
    _, path, _ = saved
    raw = path.read_bytes()
    table, data = header_of(raw)
    start = len(raw) - len(data)
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        low, high = entry["data_offsets"]
        edited = bytearray(raw)
        edited[start + (low + high) // 2] ^= 1
        path.write_bytes(edited)
        refuse(path, rf"{name} was edited or damaged")


def test_every_edited_byte_of_the_header_is_refused(saved):
    _, path, _ = saved
    raw = path.read_bytes()
    length = 8 + len(raw) - 8 - len(header_of(raw)[1])
    for place in [*range(9), *range(9, length, 97)]:
        edited = bytearray(raw)
        edited[place] ^= 1
        path.write_bytes(edited)
        if json_equal(raw, edited):
            continue
        with pytest.raises(InputError):
            load(path, net(seed=1))


def json_equal(raw, edited):
    try:
        return header_of(raw)[0] == header_of(bytes(edited))[0]
    except ValueError:
        return False


def test_a_truncated_file_names_the_tensor_that_is_cut(saved):
    _, path, _ = saved
    raw = path.read_bytes()
    table, data = header_of(raw)
    last = max((n for n in table if n != "__metadata__"), key=lambda n: table[n]["data_offsets"][1])
    path.write_bytes(raw[:-1])
    refuse(path, f"truncated: {last} is not whole")
    with pytest.raises(InputError, match="truncated"):
        inspect_file(path)
    for keep in (0, 5, 8, 9, 100, len(raw) - len(data), len(raw) // 2):
        path.write_bytes(raw[:keep])
        refuse(path, "truncated|no safetensors file")
    path.write_bytes(raw + b"\0")
    refuse(path, "damaged")


def rewrite(path, change):
    """Let `change` edit tensors and metadata, then write a file whose digests are right."""
    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["remanence.compress"])
    tensors = load_file(path)
    change(tensors, fields)
    fields.pop("digest")
    fields["digests"] = "".join(
        f"{zlib.crc32(tensors[n].reshape(-1).view(torch.uint8).numpy()):08x}"
        for n in sorted(tensors)
    )
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    text = json.dumps(fields | {"digest": digest(fields, entries)})
    save_file(tensors, path, {"remanence.compress": text})


def _code_out_of_range(tensors, fields):
    tensors["head.codes"].zero_()
    tensors["head.codes"][0] = 9  # the first code above the last codeword
    tensors["head.codebook"] = tensors["head.codebook"][:9].contiguous()
    fields["layers"]["head"]["codewords"] = 9


def _nan_codebook(tensors, _):
    tensors["head.codebook"][3, 1] = float("nan")


def _wrong_shape(tensors, _):
    tensors["stem.bias"] = tensors["stem.bias"][:-1].contiguous()


def _codes_missing(tensors, _):
    del tensors["wide.codes"]


def _codebook_cut(tensors, _):
    tensors["wide.codebook"] = tensors["wide.codebook"][:, :1].contiguous()


def _tensor_missing(tensors, _):
    del tensors["stem.weight"]


def _tensor_unknown(tensors, _):
    tensors["stem.extra"] = torch.zeros(3)


def _layer_unknown(tensors, fields):
    for part in ("codes", "codebook"):
        tensors[f"attic.{part}"] = tensors.pop(f"wide.{part}")
    fields["layers"]["attic"] = fields["layers"].pop("wide")


def _layer_of_another_shape(_, fields):
    fields["layers"]["grouped"]["groups"] = 4


def _block_that_does_not_divide(_, fields):
    fields["layers"]["up"]["block"] = 3


def _new_version(_, fields):
    fields["version"] = 99


def _norm_unknown(_, fields):
    fields["folded"] = ["bn", "other_bn"]


def _no_kind(_, fields):
    fields["layers"]["wide"]["kind"] = "lstm"


def _layers_are_a_list(_, fields):
    fields["layers"] = ["wide"]


def _odd_shape(_, fields):
    fields["layers"]["wide"]["shape"] = "64x5"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_code_out_of_range, r"head\.codes points beyond its 9 codewords"),
        (_nan_codebook, r"head\.codebook holds NaN"),
        (_wrong_shape, r"stem\.bias has shape \(16,\), the file \(15,\)"),
        (_codes_missing, r"wide\.codes should have shape"),
        (_codebook_cut, r"wide\.codebook should have shape"),
        (_tensor_missing, r"no tensor stem\.weight"),
        (_tensor_unknown, r"no tensor stem\.extra"),
        (_layer_unknown, "no layer attic"),
        (_layer_of_another_shape, "grouped"),
        (_block_that_does_not_divide, "up: a row of 20"),
        (_new_version, "version 99 and this library reads 1: update it"),
        (_norm_unknown, "other_bn is a batch norm in one of the two only"),
        (_no_kind, "wide: .* is no quantised layer"),
        (_layers_are_a_list, "header is damaged"),
        (_odd_shape, "header is damaged|is no quantised layer"),
    ],
)
def test_a_consistent_file_of_wrong_content_is_refused(saved, change, match):
    _, path, _ = saved
    rewrite(path, change)
    refuse(path, match)


def test_another_architecture_is_refused_by_name(saved):
    _, path, _ = saved
    other = net()
    other.head = nn.Linear(64, 10)
    with pytest.raises(
        InputError, match=r'saved \({"name": "Net"}\): head is linear \(10, 64\), there'
    ):
        load(path, other)
    with pytest.raises(InputError, match="not the one that was saved"):
        load(path, timm.create_model("resnet18"))
    with pytest.raises(InputError, match="give the network, or a function"):
        load(path)
    with pytest.raises(InputError, match="mode 'quick' is unknown"):
        load(path, net(), mode="quick")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickled_payload_is_never_opened(saved, tmp_path, monkeypatch):
    model, path, _ = saved
    monkeypatch.chdir(tmp_path)
    path.write_bytes(pickle.dumps(Bomb()))
    refuse(path, "no safetensors file; pickled checkpoints are not opened")
    torch.save({"weight": Bomb()}, path)
    refuse(path, "no safetensors file")
    assert not (tmp_path / "exploded").exists()
    refuse(tmp_path / "none", "cannot be read: No such file")
    refuse(tmp_path, "cannot be read")
    save_file({"a": torch.zeros(2)}, path)
    refuse(path, "header is damaged, or another program wrote it")
    assert model is not None


def test_random_damage_never_gets_through(saved):
    _, path, _ = saved
    raw = path.read_bytes()
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        edited = bytearray(raw)
        at = int(torch.randint(len(raw), (), generator=g))
        edited[at : at + 8] = os.urandom(8)
        path.write_bytes(edited)
        if bytes(edited) != raw:
            with pytest.raises(InputError):
                load(path, net(seed=1))


def test_a_plan_made_by_hand_stores_as_planned(tmp_path):
    model = nn.Sequential(nn.Linear(12, 50))
    layout = find_layers(model)["0"].layout
    planned = Plan((LayerPlan("0", layout, 3, 32),))
    assert save(quantise(model, planned), tmp_path / "f") == size(
        nn.Sequential(nn.Linear(12, 50)), planned
    )
