"""Features piece by piece against one pass, and in chunks against the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.cpc import model as module
from remanence.speech.cpc.model import CPC
from remanence.speech.cpc.stream import FeatureStream

TINY: dict[str, Any] = {
    "hidden": 12,
    "context_layers": 2,
    "steps": 3,
    "heads": 2,
    "ffn": 20,
    "window": 10,
}


def network(sample_rate: int = 16_000) -> CPC:
    torch.manual_seed(0)
    return CPC(**TINY, sample_rate=sample_rate)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_pass(model: CPC, wave: Tensor, layer: Any) -> Tensor:
    with torch.no_grad():
        z = model.encode(wave)
        if layer in ("encoder", 0):
            return z
        found = model.lstm(z)[0]
        if layer != 1:
            return found
        lower = torch.nn.LSTM(12, 12, batch_first=True)
        weights = model.lstm.state_dict()
        lower.load_state_dict({name: w for name, w in weights.items() if name.endswith("l0")})
        return lower(z)[0]


def pieces(wave: Tensor, how: str) -> list[Tensor]:
    if how == "uneven":
        generator = torch.Generator().manual_seed(3)
        parts, start = [], 0
        while start < wave.shape[-1]:
            length = int(torch.randint(0, 700, (), generator=generator))
            parts.append(wave[..., start : start + length])
            start += length
        return parts
    return list(wave.split(int(how), dim=-1))


@pytest.mark.parametrize("layer", ["context", "encoder", 0, 1, 2])
@pytest.mark.parametrize("how", ["1", "160", "311", "100000", "uneven"])
def test_any_pieces_give_one_pass(layer: Any, how: str) -> None:
    model = network()
    stream = FeatureStream(model, layer)
    for seed, samples in enumerate((2_003, 159, 160, 311, 312, 465, 480)):  # one stream, all files
        wave = noise(samples, seed=seed)
        found = [stream.push(piece) for piece in pieces(wave, how)]
        together = torch.cat([*found, stream.flush()])
        expected = one_pass(model, wave[None], layer)[0]
        assert together.shape == expected.shape
        assert torch.allclose(together, expected, atol=2e-6)


@pytest.mark.parametrize(("sample_rate", "after"), [(16_000, 311), (8_000, 151)])
def test_a_frame_comes_with_its_last_sample(sample_rate: int, after: int) -> None:
    stream = FeatureStream(network(sample_rate))
    stride = sample_rate // 100
    for t in range(5):
        already = 0 if t == 0 else stride * (t - 1) + after + 1
        assert stream.push(noise(stride * t + after - already)).shape == (0, 12)
        assert stream.push(noise(1)).shape == (1, 12)


def test_streams_hold_little() -> None:
    stream = FeatureStream(network())
    for _ in range(30):
        stream.push(noise(1_000))
        assert sum(piece.numel() for piece in stream._pieces) < 1_000 + 2 * 160 + 312


def test_no_frame_from_almost_nothing() -> None:
    stream = FeatureStream(network())
    assert stream.flush().shape == (0, 12)
    assert stream.push(noise(158)).shape == (0, 12)
    assert stream.flush().shape == (0, 12)


def test_modes_gradients_and_batches() -> None:
    model, wave = network().train(), noise(2, 1_500)
    stream = FeatureStream(model)
    found = torch.cat([stream.push(wave[:, :700]), stream.push(wave[:, 700:]), stream.flush()], 1)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not found.requires_grad
    assert torch.allclose(found, model.features(wave), atol=2e-6)
    stream.push(wave)
    with pytest.raises(InputError, match="every time"):
        stream.push(wave[0])


@pytest.mark.parametrize("layer", ["context", "encoder", 1])
@pytest.mark.parametrize("piece", [1, 3, 1024])
def test_features_are_one_pass(layer: Any, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    model = network()
    for samples in (159, 160 * 7, 2_001):
        wave = noise(2, samples)
        expected = one_pass(model, wave, layer)
        assert torch.allclose(model.features(wave, layer), expected, atol=2e-6)
        assert torch.allclose(model.features(wave[0], layer), expected[0], atol=2e-6)


def test_nothing_is_known_of_the_last_recording() -> None:
    model, other, wave = network(), noise(5_000, seed=1), noise(2_000)
    first = model.features(wave)
    model.features(other)
    assert torch.equal(model.features(wave), first)
    chunked = model.features(wave, chunk=480)
    model.features(other, chunk=480)
    assert torch.equal(model.features(wave, chunk=480), chunked)


# --- chunks


def in_chunks(
    model: CPC, wave: Tensor, chunk: int, *, strict: bool, seq_norm: bool, layer: str
) -> Tensor:
    """As the released code, but for its empty last slice, which kept all frames."""
    state, found, start = None, [], 0

    def features(part: Tensor) -> Tensor:
        nonlocal state
        y = model.encode(part[None])
        if layer == "context":
            y, state = model.lstm(y, state)
        y = y[0].double()
        if seq_norm:
            y = (y - y.mean(0)) / (y.var(0) + 1e-8).sqrt()
        return y

    while start < len(wave):
        if strict and start + chunk > len(wave):
            break
        found.append(features(wave[start : start + chunk]))
        start += chunk
    rest = (len(wave) - start) // 160
    if strict and rest > 0:
        found.append(features(wave[-chunk:])[-rest:])
    return torch.cat(found).float()


@pytest.mark.parametrize("layer", ["context", "encoder"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seq_norm", [False, True])
@pytest.mark.parametrize("samples", [800, 1_600, 1_930, 2_399, 500])
def test_the_released_chunks(layer: Any, strict: bool, seq_norm: bool, samples: int) -> None:
    model, wave = network(), noise(samples)
    with torch.no_grad():
        expected = in_chunks(model, wave, 800, strict=strict, seq_norm=seq_norm, layer=layer)
    found = model.features(wave, layer, chunk=800, strict=strict, seq_norm=seq_norm)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=2e-4 if seq_norm else 2e-6)
    twice = model.features(torch.stack([wave, wave.flip(0)]), layer, chunk=800, strict=strict)
    assert torch.allclose(twice[0], model.features(wave, layer, chunk=800, strict=strict))


def test_tails_too_short_for_a_frame() -> None:
    model, wave = network(), noise(1_600 + 158)
    for strict in (False, True):
        assert model.features(wave, chunk=800, strict=strict).shape == (10, 12)
    tail = model.features(noise(800 + 200), chunk=800, seq_norm=True)[5:]
    assert torch.equal(tail, torch.zeros(1, 12))  # one frame has no variance


def test_seq_norm_of_the_whole() -> None:
    found = network().features(noise(2, 4_000), seq_norm=True)
    assert torch.allclose(found.mean(1), torch.zeros(2, 12), atol=1e-5)
    assert torch.allclose(found.std(1), torch.ones(2, 12), atol=1e-2)


def test_bad_input() -> None:
    model, wave = network(), noise(2_000)
    for message, call in {
        "at least 159 samples": lambda: model.features(wave[:158]),
        "give \\(B, T\\)": lambda: model.features(wave.view(1, 1, -1)),
        "strict is about chunks": lambda: model.features(wave, strict=True),
        "chunk 100": lambda: model.features(wave, chunk=100),
        "chunk 250": lambda: model.features(wave, chunk=250),
        "layer 'top'": lambda: model.features(wave, "top"),  # type: ignore[arg-type] # on purpose
        "layer 3": lambda: model.features(wave, 3),
        "layer -1": lambda: FeatureStream(model, -1),
        "every time": lambda: FeatureStream(model).push(wave.view(1, 1, -1)),
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
