"""CPC: its predictors against attention spelt out, causality, sizes, and its folder."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from remanence.errors import InputError
from remanence.speech.cpc.loss import CPCLoss
from remanence.speech.cpc.model import CPC
from remanence.speech.cpc.predictor import (
    Attention,
    LinearPredictor,
    MultiheadPredictor,
    SeparatePredictors,
    _rotate,
    skew,
)

H, K, HEADS, DISTANCES = 12, 3, 2, 7
TINY: dict[str, Any] = {
    "hidden": 12,
    "context_layers": 2,
    "steps": 3,
    "heads": 2,
    "ffn": 20,
    "window": 10,
    "sample_rate": 8_000,
}
KINDS = [
    {"predictor": "multihead", "positions": "relative"},
    {"predictor": "multihead", "positions": "rotary"},
    {"predictor": "separate", "positions": "relative"},
    {"predictor": "separate", "positions": "rotary"},
    {"predictor": "linear"},
]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def randomised(module: nn.Module) -> Any:
    """Return it in float64 and eval mode, with no parameter at 0 or 1."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- predictors


def attend(attention: Attention, x: Tensor, group: int) -> Tensor:
    """One group's attention of one sequence (W, H), position by position."""
    width, groups, head_size = len(x), attention.groups, H // HEADS
    rows = attention.qkv.weight.view(3, groups, HEADS, head_size, H)[:, group]
    q, k, v = (torch.einsum("hdi,wi->hwd", part, x) for part in rows)
    out = torch.zeros(width, H, dtype=x.dtype)
    for i in range(width):
        for h in range(HEADS):
            logits = []
            for j in range(i + 1):
                logit = q[h, i] @ k[h, j]
                if attention.relative is not None:
                    table = attention.relative.table[group]
                    column = table.shape[1] - 1 - min(i - j, table.shape[1] - 1)
                    logit = logit + q[h, i] @ table[:, column]
                else:
                    logit = turned(q[h, i], i) @ turned(k[h, j], j)
                logits.append(logit / math.sqrt(head_size))
            weights = torch.stack(logits).softmax(0)
            out[i, h * head_size : (h + 1) * head_size] = weights @ v[h, : i + 1]
    return linear(out, attention.out.weight[group])


def turned(x: Tensor, position: int) -> Tensor:
    """Entries i and i + half are a complex number, times exp(1j position 10000^(-i / half))."""
    half = len(x) // 2
    angle = position * 10_000 ** (-torch.arange(half, dtype=x.dtype) / half)
    y = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([y.real, y.imag])


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize("width", [1, DISTANCES - 2, DISTANCES, DISTANCES + 4])
def test_multihead(positions: Any, width: int) -> None:
    made = randomised(
        MultiheadPredictor(H, K, heads=HEADS, ffn=20, positions=positions, distances=DISTANCES)
    )
    c = noise(2, width, H)
    for b in range(2):
        y = made.attention_norm(c[b] + attend(made.attention, c[b], 0))
        each = made.contract(made.expand(y).relu()).view(width, K, H)
        expected = torch.stack([made.norm(y + each[:, k]) for k in range(K)], dim=1)
        # The angles are float32.
        assert torch.allclose(made(c)[b], expected, atol=1e-10 if positions == "relative" else 1e-5)


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize("width", [DISTANCES - 2, DISTANCES + 4])
def test_separate(positions: Any, width: int) -> None:
    made = randomised(
        SeparatePredictors(H, K, heads=HEADS, ffn=20, positions=positions, distances=DISTANCES)
    )
    c = noise(2, width, H)
    for b in range(2):
        for k in range(K):
            norms = [(norm.weight[k], norm.bias[k]) for norm in (made.attention_norm, made.norm)]
            y = layer_norm(c[b] + attend(made.attention, c[b], k), (H,), *norms[0])
            wide = linear(y, made.expand.weight[k], made.expand.bias[k]).relu()
            y = layer_norm(
                y + linear(wide, made.contract.weight[k], made.contract.bias[k]), (H,), *norms[1]
            )
            tolerance = 1e-10 if positions == "relative" else 1e-5
            assert torch.allclose(made(c)[b, :, k], y, atol=tolerance)


def test_linear() -> None:
    made, c = randomised(LinearPredictor(H, K)), noise(2, 5, H)
    assert torch.allclose(made(c)[:, :, 1], c @ made.linear.weight[H : 2 * H].T)


def test_skew() -> None:
    x = noise(2, 5, 5)
    for i in range(5):
        for j in range(i + 1):
            assert torch.equal(skew(x)[:, i, j], x[:, i, 4 - (i - j)])


def test_rotary_products_depend_on_distance_alone() -> None:
    q, k = (noise(2, 1, 6)[i].expand(40, -1) for i in range(2))
    products = _rotate(q) @ _rotate(k).T
    for distance in range(-3, 4):
        same = products.diagonal(distance)
        assert torch.allclose(same, same[:1], atol=1e-5)
    assert (products[0] - products[0, 0]).abs().max() > 0.1


def test_dropout_is_for_training() -> None:
    c = noise(1, 6, H).float()
    for made in (
        MultiheadPredictor(H, K, heads=2, ffn=64, rate=0.5),
        SeparatePredictors(H, K, heads=2, ffn=64, rate=0.5),
    ):
        assert not torch.equal(made(c), made(c))
        made.eval()
        assert torch.equal(made(c), made(c))


# --- the network


def test_parameter_counts() -> None:
    cpc2 = CPC(**CPC.presets["cpc2"])
    assert size(cpc2.predictor) == 7_087_744
    assert size(cpc2.lstm) == 2 * 526_336
    assert size(cpc2) == size(CPC()) == 9_457_536
    with torch.device("meta"):
        cpc = CPC(context_layers=1, predictor="separate")
    assert size(cpc.predictor) == 12 * 1_317_760
    assert size(cpc) == 17_656_576


@pytest.mark.parametrize("kind", KINDS)
def test_causality(kind: dict[str, Any]) -> None:
    """What comes after sample 80 t + 151 moves nothing at t; sample 80 t + 151 moves all."""
    model, t = CPC(**TINY, **kind).double().eval(), 12
    wave, last = noise(1, 20 * 80), 80 * t + 151

    def outputs(wave: Tensor) -> list[Tensor]:
        z = model.encode(wave)
        c, _ = model.context(z)
        return [z, c, model.predict(c)]

    before = outputs(wave)
    for cut, moves in ((last + 1, False), (last, True)):
        changed = wave.clone()
        changed[:, cut:] += 1
        for ours, theirs in zip(outputs(changed), before, strict=True):
            assert torch.equal(ours[:, : t + 1 - moves], theirs[:, : t + 1 - moves])
            assert not torch.equal(ours[:, t + 1 - moves], theirs[:, t + 1 - moves])


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_do_not_depend_on_the_length(kind: dict[str, Any]) -> None:
    model, c = CPC(**TINY, **kind).double().eval(), noise(1, 25, 12)
    whole = model.predict(c)
    for width in (1, 5, 7, 8, 24):
        assert torch.allclose(model.predict(c[:, :width]), whole[:, :width], atol=1e-12)


def test_context_goes_on_from_its_state() -> None:
    model, z = CPC(**TINY), noise(2, 9, 12).float()
    whole, (hidden, cell) = model.context(z)
    first, state = model.context(z[:, :4])
    rest, ends = model.context(z[:, 4:], state)
    assert torch.allclose(torch.cat([first, rest], dim=1), whole, atol=1e-6)
    assert torch.allclose(torch.stack(ends), torch.stack((hidden, cell)), atol=1e-6)
    expected, (expected_hidden, _) = model.lstm(z)
    assert torch.allclose(whole, expected, atol=1e-6)
    assert torch.allclose(hidden, expected_hidden, atol=1e-6)
    lower = nn.LSTM(12, 12, batch_first=True)
    lower.load_state_dict({k: v for k, v in model.lstm.state_dict().items() if k.endswith("l0")})
    assert torch.allclose(model.context(z, layers=1)[0], lower(z)[0], atol=1e-6)


def test_the_lstm_is_float32_inside_autocast() -> None:
    model, wave = CPC(**TINY), noise(2, 800).float()
    with torch.autocast("cpu", torch.bfloat16):
        z = model.encode(wave).float()
        c, _ = model.context(z)
        predictions = model.predict(c)
    assert c.dtype == torch.float32
    assert torch.equal(c, model.context(z)[0])
    assert predictions.isfinite().all()


@pytest.mark.parametrize("sample_rate", [8_000, 16_000])
def test_the_small_preset_learns(sample_rate: int) -> None:
    """A hundred windows of a few notes: the next frames are soon told from others."""
    torch.manual_seed(0)
    model = CPC(**CPC.presets["small"], sample_rate=sample_rate)
    loss = CPCLoss(8, 16)
    at = torch.arange(int(0.9 * sample_rate)) / sample_rate
    sweep = (250 * at + 400 * at**2)[None] * torch.arange(1, 5)[:, None]
    wave = 0.3 * torch.sin(2 * torch.pi * sweep)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    first, last = 0.0, 0.0
    for step in range(25):
        z = model.encode(wave)
        c, _ = model.context(z)
        total = loss(model.predict(c[:, :-8]), z)[0].mean()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        first, last = (total.item() if step == 0 else first), total.item()
    assert first == pytest.approx(math.log(17), abs=0.1)
    assert last < first - 0.5


def test_gradients_reach_everything() -> None:
    for kind in KINDS:
        model = CPC(**TINY, **kind)
        z = model.encode(noise(2, 800).float())
        predictions = model.predict(model.context(z)[0][:, :-3])
        CPCLoss(3, 5)(predictions, z)[0].sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_arguments_out_of_range() -> None:
    for message, wrong in {
        "context_layers 0": {"context_layers": 0},
        "steps 10 of a window of 10": {"steps": 10},
        "predictor 'lstm'": {"predictor": "lstm"},
        "heads 5 of width 12": {"heads": 5},
        "heads 0": {"heads": 0},
        "ffn 0": {"ffn": 0},
        "dropout 1": {"dropout": 1.0},
        "positions 'absolute'": {"positions": "absolute"},
        "an even size": {"positions": "rotary", "heads": 4},
        "sample_rate 44100": {"sample_rate": 44_100},
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            CPC(**{**TINY, **wrong})
        assert "\n" not in str(caught.value)


# --- its folder


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: dict[str, Any], tmp_path: Path) -> None:
    model, wave = CPC(**TINY, **kind), noise(1_000).float()
    model.save(tmp_path / "run")
    found = CPC.load(tmp_path / "run")
    assert found.config == model.config == CPC(**model.config).config
    assert not found.training
    assert torch.equal(found.features(wave), model.features(wave))
    assert json.loads((tmp_path / "run/config.json").read_text())["architecture"] == "cpc"
    found.context(torch.zeros(1, 2, 12))[0].sum().backward()  # it can be trained further


def test_folders_that_hold_no_network(tmp_path: Path) -> None:
    model = CPC(**TINY)

    def damaged(message: str, config: Any = None, weights: Any = None) -> None:
        model.save(tmp_path)
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (tmp_path / "config.json").write_text(text)
        if isinstance(weights, bytes):
            (tmp_path / "model.safetensors").write_bytes(weights)
        elif weights is not None:
            save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=message) as caught:
            CPC.load(tmp_path)
        assert "\n" not in str(caught.value)

    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # Copies: what is read may be a map of the file, which is cut short below.
    weights = {k: v.clone() for k, v in load_file(tmp_path / "model.safetensors").items()}
    name = "encoder.norms.0.weight"
    damaged("no readable config.json", config="{")
    damaged("no readable config.json", config="[" * 100_000)
    damaged("not 'cpc'", config=[])
    damaged("not 'cpc'", config={**config, "architecture": "resnet18"})
    damaged("no arguments of a CPC network", config={**config, "colour": "red"})
    damaged("no arguments of a CPC network", config={**config, "hidden": "wide"})
    damaged("no arguments of a CPC network", config={**config, "hidden": 1})
    damaged("no arguments of a CPC network", config={**config, "context_layers": 10**9})
    damaged("tensors are not those", config={**config, "hidden": 10**5 * 12})
    damaged("tensors are not those", config={**config, "window": 11})
    damaged("missing or damaged", weights=b"")
    damaged("missing or damaged", weights=b"\x80\x04K\x01.")  # a pickle
    damaged("tensors are not those", weights={name: weights[name]})
    damaged("tensors are not those", weights={**weights, "more": weights[name].clone()})
    damaged("NaN or infinity", weights={**weights, name: weights[name] * torch.nan})
    with pytest.raises(InputError, match=r"no readable config\.json"):
        CPC.load(tmp_path / "nowhere")
    model.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="missing or damaged"):
        CPC.load(tmp_path)
