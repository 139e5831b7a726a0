"""The catalyzer's network and its rank loss: definition, batches, nested dimensions, its file."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from remanence.errors import InputError
from remanence.search.catalyzer import network as network_file
from remanence.search.catalyzer.network import ATTENUATION, KEY, Catalyzer
from remanence.search.catalyzer.triplet import rank_triplet_loss

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FLOAT64 = torch.float64


def drawn(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(
    in_dim: int = 40, dims: tuple[int, ...] = (16, 24), seed: int = 0, *, shortcut: bool = True
) -> Catalyzer:
    """Return a network whose head is not 0, nor the statistics of its batch norms 0 and 1."""
    torch.manual_seed(seed)
    network = Catalyzer(in_dim, dims, hidden=32, shortcut=shortcut)
    network.initialise(3 * drawn(200, in_dim, seed) + 2)
    network.head.reset_parameters()
    for start in range(20):
        network(3 * drawn(64, in_dim, start) + 2)
    return network


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- the rank loss


def test_the_loss_is_its_definition() -> None:
    a, p, n = (drawn(50, 7, seed, FLOAT64) for seed in range(3))
    terms = [
        max(0.0, math.dist(a[i].tolist(), p[i].tolist()) - math.dist(a[i].tolist(), n[i].tolist()))
        for i in range(50)
    ]
    assert 10 < sum(term > 0 for term in terms) < 40
    loss = rank_triplet_loss(a, p, n)
    assert loss.dtype == FLOAT64
    assert loss.item() == pytest.approx(sum(terms) / 50, abs=1e-14)
    rounded = rank_triplet_loss(a.float(), p.float(), n.float())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(loss.item(), abs=1e-6)


def test_the_gradient_is_exact() -> None:
    triplet = [drawn(9, 4, seed, FLOAT64).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(rank_triplet_loss, triplet)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64, torch.bfloat16])
def test_no_distance_has_no_gradient(dtype: torch.dtype) -> None:
    """Row 0: a = p. Row 1: a = n. Row 2: all three. Row 3 lies apart."""
    a, p, n = (drawn(4, 5, seed).to(dtype) for seed in range(3))
    p[0], n[1], p[2], n[2] = a[0], a[1], a[2], a[2]
    triplet = [z.requires_grad_() for z in (a, p, n)]
    rank_triplet_loss(*triplet).backward()
    for z in triplet:
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert not z.grad[2].any()
    assert p.grad is not None
    assert n.grad is not None
    assert not p.grad[0].any()
    assert not n.grad[1].any()
    # The other side of row 1 still pulls, with the gradient of a distance: of length 1 / 4.
    assert p.grad[1].float().norm().item() == pytest.approx(0.25, rel=1e-2)


def test_tiny_distances_keep_their_gradient() -> None:
    a = torch.zeros(1, 3)
    p = torch.tensor([[3e-18, 4e-18, 0.0]], requires_grad=True)
    rank_triplet_loss(a, p, a).backward()
    assert p.grad is not None
    assert torch.allclose(p.grad, torch.tensor([[0.6, 0.8, 0.0]]), atol=1e-4)


def test_autocast_changes_nothing() -> None:
    triplet = [drawn(64, 16, seed).bfloat16() for seed in range(3)]
    plain = rank_triplet_loss(*(z.float() for z in triplet))
    with torch.autocast("cpu", torch.bfloat16):
        cast = rank_triplet_loss(*triplet)
        of_floats = rank_triplet_loss(*(z.float() for z in triplet))
    assert torch.equal(cast, plain)
    assert torch.equal(of_floats, plain)


def test_triplets_of_unlike_shapes() -> None:
    z = drawn(4, 3)
    for triplet in [(z, z, z[:3]), (z, z[:, :2], z), (z[:0], z[:0], z[:0]), (z[0], z[0], z[0])]:
        refused(lambda triplet=triplet: rank_triplet_loss(*triplet), "three times the same")


# --- the network


def test_layers_are_the_papers() -> None:
    kinds = [type(layer).__name__ for layer in made().body]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2
    assert sum(
        p.numel() for p in Catalyzer(96, [24], hidden=1024, shortcut=False).parameters()
    ) == ((96 + 1) * 1024 + 2 * 2 * 1024 + (1024 + 1) * 1024 + (1024 + 1) * 24)


@pytest.mark.parametrize("shortcut", [True, False])
def test_an_embedding_is_the_network_by_hand(shortcut: bool) -> None:
    """Running statistics, float64 throughout, each prefix to length 1 by itself."""
    network = made(shortcut=shortcut)
    x = 3 * drawn(30, 40, 7) + 2
    weights = {name: value.double() for name, value in network.state_dict().items()}
    h = inputs = (x.double() - weights["shift"]) / weights["scale"]
    for linear, norm in ((0, 1), (3, 4)):
        h = h @ weights[f"body.{linear}.weight"].T + weights[f"body.{linear}.bias"]
        variance = weights[f"body.{norm}.running_var"] + 1e-5
        h = (h - weights[f"body.{norm}.running_mean"]) / variance.sqrt()
        h = (h * weights[f"body.{norm}.weight"] + weights[f"body.{norm}.bias"]).clamp(min=0)
    out = h @ weights["head.weight"].T + weights["head.bias"]
    if shortcut:
        out += inputs @ weights["shortcut.weight"].T
    for dim in (16, 24):
        prefix = out[:, :dim]
        expected = prefix / prefix.norm(dim=1, keepdim=True)
        assert (network.at(dim).embed(x) - expected).abs().max() < 1e-5
    short, full = network.at(16).embed(x), network.at(24).embed(x)
    assert torch.allclose(short.norm(dim=1), torch.ones(30))
    assert torch.allclose(full.norm(dim=1), torch.ones(30))
    assert (short - full[:, :16]).abs().max() > 0.01  # no mere cut
    cut = full[:, :16] / full[:, :16].norm(dim=1, keepdim=True)
    assert torch.allclose(short, cut, atol=1e-5)


def test_an_image_depends_on_neither_batch_nor_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made(), 3 * drawn(300, 40, 5) + 2
    network.train()
    network.body[4].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    embedding = network.at(16)
    whole = embedding.embed(x)
    assert network.training
    assert network.body[1].training
    assert not network.body[4].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not whole.requires_grad
    network.eval()
    assert torch.equal(embedding.embed(x), whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedding.embed(x), whole)
    alone = torch.cat([embedding.embed(row.unsqueeze(0)) for row in x])
    assert (alone - whole).abs().max() < 1e-6
    other = embedding.embed(torch.cat([x[:3], 50 * drawn(9, 40)]))[:3]
    assert (other - whole[:3]).abs().max() < 1e-6
    monkeypatch.setattr(network_file, "ROWS", 64)
    assert (embedding.embed(x) - whole).abs().max() < 1e-6


def test_embed_takes_bytes_and_nothing() -> None:
    embedding = made().at(16)
    x = torch.randint(256, (20, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(embedding.embed(x), embedding.embed(x.float()))
    assert embedding.embed(x.double()).dtype == torch.float32
    assert embedding.embed(x[:0]).shape == (0, 16)


def test_autocast_keeps_the_last_layer_exact() -> None:
    network, x = made().eval(), 3 * drawn(50, 40, 5) + 2
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x)
        z = network.unit(out, 16)
    assert out.dtype == z.dtype == torch.float32
    assert 1e-6 < (z - network.at(16).embed(x)).abs().max() < 0.1
    assert (z.double().norm(dim=1) - 1).abs().max() < 1e-6
    assert not torch.equal(out, out.bfloat16().float())


def test_bad_vectors() -> None:
    network = made()
    embedding = network.at(16)
    refused(lambda: embedding.embed(drawn(5, 39)), r"\(5, 39\).*dimension 40")
    refused(lambda: embedding.embed(drawn(40, 40)[0]), r"\(40,\)")
    refused(lambda: network(drawn(5, 41)), "dimension 40")
    x = drawn(9000, 40)
    x[8500, 3] = math.inf
    x[8600, 3] = math.nan
    refused(lambda: embedding.embed(x), "row 8500 holds")
    refused(lambda: network.initialise(x), "row 8500 holds")
    refused(lambda: network.at(20), "dimension 20 of a catalyzer for 16, 24")


def test_bad_sizes() -> None:
    for in_dim, dims, hidden in [(0, [4], 8), (8, [], 8), (8, [1], 8), (8, [4], 0)]:
        refused(lambda a=in_dim, b=dims, c=hidden: Catalyzer(a, b, hidden=c), "give at least")
    refused(lambda: Catalyzer(8, [6, 4], hidden=8), "rising")
    refused(lambda: Catalyzer(8, [4, 4], hidden=8), "rising")


def test_more_dimensions_than_the_input_warn() -> None:
    with pytest.warns(UserWarning, match="from 8 up to 16 dimensions"):
        Catalyzer(8, [4, 16], hidden=8)


# --- standardisation


def test_standardise_is_mean_and_one_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(1000, 6, 0, FLOAT64) * torch.arange(1, 7) + 1000
    network = Catalyzer(6, [4], hidden=8)
    monkeypatch.setattr(network_file, "ROWS", 77)
    for scaled in (x, x.float()):
        network.initialise(scaled)
        centred = x - x.mean(0)
        assert torch.allclose(network.shift, x.mean(0).float(), rtol=1e-6)
        assert network.scale.item() == pytest.approx(
            centred.square().mean().sqrt().item(), rel=1e-5
        )


def test_vectors_all_the_same() -> None:
    network = Catalyzer(6, [4], hidden=8)
    for value in (0.0, 0.1, 1e8):
        for dtype in (torch.float32, FLOAT64):
            same = torch.full((6001, 6), value, dtype=dtype)
            refused(lambda same=same: network.initialise(same), "all the same")
    refused(lambda: network.initialise(drawn(0, 6)), "at least 2")
    assert network.scale.item() == 1


def test_one_far_constant_coordinate_is_no_constant_vector() -> None:
    x = drawn(100, 6)
    x[:, 0] = 1e9
    network = Catalyzer(6, [4], hidden=8)
    network.initialise(x)
    assert network.scale.item() == pytest.approx(math.sqrt(5 / 6), rel=0.1)


def test_the_untrained_map_is_that_of_attenuated_principal_components() -> None:
    x = drawn(500, 8) @ drawn(8, 8, 1) + 3
    network = Catalyzer(8, [3, 5], hidden=16)
    network.initialise(x)
    centred = (x - x.mean(0)).double()
    variances, directions = torch.linalg.eigh(centred.mT @ centred / 500)
    for dim in (3, 5):
        kept = variances.flip(0)[:dim]
        projected = centred @ directions.flip(1)[:, :dim] * kept ** (-ATTENUATION / 2)
        expected = projected / projected.norm(dim=1, keepdim=True)
        seen = network.at(dim).embed(x)
        assert torch.allclose((seen @ seen.mT).double(), expected @ expected.mT, atol=1e-5)


def test_a_trained_network_is_not_begun_again() -> None:
    """Or training end to end would start from nothing."""
    network = made()
    digest = network.at(24).digest
    network.initialise(drawn(100, 40))
    assert network.at(24).digest == digest
    refused(lambda: network.initialise(drawn(100, 39)), "dimension 40")


# --- the digest


def test_digests_tell_dimensions_and_weights_apart() -> None:
    network = made()
    short, full = network.at(16), network.at(24)
    first = short.digest
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert first != full.digest
    assert first == made().at(16).digest
    assert first != made(seed=1).at(16).digest
    network.train()
    short.embed(drawn(5, 40))
    assert short.digest == first
    for name, value in network.state_dict().items():
        kept = value.clone()
        value.view(-1)[-1] += 1
        # An embedding made before never vouches for weights that it no longer uses.
        assert short.digest == network.at(16).digest != first, name
        value.copy_(kept)
    assert short.digest == first
    assert network.bfloat16().at(16).digest != first


# --- the file


def test_a_file_keeps_every_bit(tmp_path: Path) -> None:
    network, x = made(), 3 * drawn(30, 40, 8) + 2
    network.save(tmp_path / "c.safetensors")
    state = torch.get_rng_state()
    loaded = Catalyzer.load(tmp_path / "c.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert (loaded.in_dim, loaded.dims, loaded.hidden) == (40, (16, 24), 32)
    assert not any(module.training for module in loaded.modules())
    assert list(loaded.state_dict()) == list(network.state_dict())
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert loaded.state_dict()[name].dtype == value.dtype
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for dim in (16, 24):
        assert loaded.at(dim).digest == network.at(dim).digest
        assert torch.equal(loaded.at(dim).embed(x), network.at(dim).embed(x))
    loaded.save(tmp_path / "again.safetensors")
    again = (tmp_path / "again.safetensors").read_bytes()
    assert again == (tmp_path / "c.safetensors").read_bytes()
    loaded.train()(x).sum().backward()  # it can be trained further


def test_a_loaded_network_outlives_its_file(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    made().save(file)
    loaded = Catalyzer.load(file)
    digest = loaded.at(16).digest
    with file.open("r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    assert loaded.at(16).digest == digest


def rewritten(file: Path, metadata: object, **changes: Tensor) -> None:
    tensors = load_file(file)
    tensors.update({name.replace("__", "."): value for name, value in changes.items()})
    kept = {KEY: metadata if isinstance(metadata, str) else json.dumps(metadata)}
    save_file(tensors, file, metadata=kept)


SHAPE = {"in_dim": 40, "dims": [16, 24], "hidden": 32, "shortcut": True}


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "[]",
        "no json",
        "[" * 100_000,
        {},
        {**SHAPE, "in_dim": 41},
        {**SHAPE, "in_dim": "many"},
        {**SHAPE, "in_dim": math.inf},
        {**SHAPE, "in_dim": 10**30},
        {**SHAPE, "hidden": 10**9},
        {**SHAPE, "hidden": None},
        {**SHAPE, "dims": []},
        {**SHAPE, "dims": "16"},
        {**SHAPE, "dims": [24, 16]},
        {**SHAPE, "dims": [16.5, 24.0]},
        {**SHAPE, "dims": [16, 25]},
        {**SHAPE, "dims": {"16": 24}},
    ],
)
def test_metadata_that_lies(tmp_path: Path, metadata: object) -> None:
    file = tmp_path / "c.safetensors"
    made().save(file)
    rewritten(file, metadata)
    refused(lambda: Catalyzer.load(file), "not a catalyzer")


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    made().save(file)
    whole = file.read_bytes()
    for broken in (b"", b"x", b"PK\x03\x04" * 30, whole[:100], whole[:-1], whole + b"0"):
        file.write_bytes(broken)
        refused(lambda: Catalyzer.load(file), "not a catalyzer")
    save_file({"weight": torch.zeros(3)}, file)
    refused(lambda: Catalyzer.load(file), "not a catalyzer")
    save_file({"weight": torch.zeros(3)}, file, metadata={KEY: json.dumps(SHAPE)})
    refused(lambda: Catalyzer.load(file), "not a catalyzer")
    refused(lambda: Catalyzer.load(tmp_path / "none"), "there is no such")
    refused(lambda: Catalyzer.load(tmp_path), "there is no such")


@pytest.mark.parametrize("name", ["head.weight", "shift", "body.4.running_var", "scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights(tmp_path: Path, name: str, value: float) -> None:
    file = tmp_path / "c.safetensors"
    made().save(file)
    weights = load_file(file)[name]
    weights.view(-1)[-1] = value
    rewritten(file, SHAPE, **{name: weights})
    refused(lambda: Catalyzer.load(file), "NaN or infinite")


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    made().save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()[KEY]) == SHAPE
