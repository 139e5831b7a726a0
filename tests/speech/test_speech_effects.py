"""Effects beyond the paper's own, each against a loop, a closed form or a count."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from remanence.errors import InputError
from remanence.speech.wavaugment.augmentation import Augmentation
from remanence.speech.wavaugment.band_reject import band_reject
from remanence.speech.wavaugment.chain import Chain, OneOf, SomeOf, from_recipe
from remanence.speech.wavaugment.clip import clip
from remanence.speech.wavaugment.frequency_drop import frequency_drop
from remanence.speech.wavaugment.noise import add_noise
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.pieces import chunk_swap, splice_out
from remanence.speech.wavaugment.pitch import pitch_shift, remap_times, speed, tempo
from remanence.speech.wavaugment.random import (
    RandomBabble,
    RandomChunkSwap,
    RandomClip,
    RandomDither,
    RandomFrequencyDrop,
    RandomGain,
    RandomNoise,
    RandomPolarity,
    RandomReverb,
    RandomRoom,
    RandomSpeed,
    RandomSpliceOut,
    RandomTempo,
    RandomTimeDrop,
)
from remanence.speech.wavaugment.reverb import convolve_room
from remanence.speech.wavaugment.row_noise import normal_noise, uniform_noise
from remanence.speech.wavaugment.time_drop import time_drop

RATE = 8000


class Shapes(TorchDispatchMode):
    """Lists the shape of each operation's result."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.found.append(tuple(out.shape))
        return out


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def waves(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed)) * 0.1


BANK = [waves(700, seed=1), waves(90, seed=2)]
ROOMS = [torch.tensor([0.1, 1, 0, 0.5]), torch.tensor([1.0, 0.3])]


def row_effects() -> list[Augmentation]:
    return [
        RandomSpeed((0.8, 1.25)),
        RandomTempo(RATE, (0.8, 1.25)),
        RandomRoom(ROOMS),
        RandomNoise(BANK, band_hz=(80, 400), sample_rate=RATE, chain=RandomReverb(RATE)),
        RandomFrequencyDrop(RATE),
        RandomTimeDrop(RATE, count=(1, 4), edge_ms=2, fill="noise"),
        RandomSpliceOut(RATE, count=3),
        RandomChunkSwap(3, 0.2),
        RandomClip((0.2, 0.9), law="uniform", keep_peak=True),
        RandomGain(),
        RandomPolarity(),
        RandomDither(6),
    ]


def every_effect() -> list[Augmentation]:
    return [
        *row_effects(),
        RandomBabble(2),
        Chain([RandomSpeed(), RandomSpliceOut(RATE), RandomBabble()]),
    ]


def name_of(effect: Augmentation) -> str:
    return type(effect).__name__


@pytest.mark.parametrize("effect", every_effect(), ids=name_of)
def test_effects_repeat_replay_keep_silence_and_rest_in_eval(effect: Augmentation) -> None:
    x = waves(6, 1, 1000)
    lengths = torch.tensor([1000, 800, 1000, 1, 1000, 0])
    y, params = effect(x, lengths, generator=seeded(), return_params=True)
    assert y.shape == x.shape
    assert not torch.equal(y, x)
    assert torch.equal(effect(x, lengths, generator=seeded()), y)
    assert not torch.equal(effect(x, lengths, generator=seeded(1)), y)
    assert torch.equal(effect(x, lengths, params=Params.from_json(params.to_json())), y)
    ends = effect.ends(lengths, params, 1000)
    assert (ends <= 1000).all()
    assert torch.equal(ends > 0, lengths > 0)
    assert effect.changes_ends or torch.equal(ends, lengths)
    for i, n in enumerate(ends.tolist()):
        assert y[i, :, n:].abs().sum() == 0
    if not isinstance(effect, RandomDither | Chain):
        assert effect(torch.zeros(3, 1, 900), generator=seeded()).abs().max() == 0
    assert effect(torch.zeros(3, 1, 900), generator=seeded()).isfinite().all()
    effect.eval()
    assert effect(x, lengths, generator=seeded()) is x


@pytest.mark.parametrize("effect", row_effects(), ids=name_of)
def test_rows_alone_and_ragged_equal_rows_of_the_batch(effect: Augmentation) -> None:
    x = waves(3, 2, 1800) + 0.05
    lengths = torch.tensor([1800, 1200, 1500])
    y, params = effect(x, lengths, generator=seeded(), return_params=True)
    for i, n in enumerate(lengths.tolist()):
        trimmed = effect(x[i, :, :n], params=params[i])
        sure = n - 656 if isinstance(effect, RandomTempo) else n
        torch.testing.assert_close(y[i, :, :sure], trimmed[:, :sure], atol=1e-5, rtol=0)


def test_only_the_rows_that_are_touched_are_computed() -> None:
    seen = []

    class Counting(RandomGain):
        def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
            seen.append((len(rows), None if lengths is None else len(lengths), len(values["db"])))
            return super().effect(rows, lengths, values)

    x = waves(200, 1, 8)
    lengths = torch.full((200,), 8)
    y, params = Counting(p=0.25)(x, lengths, generator=seeded(), return_params=True)
    touched = params.values["apply"]
    n = int(touched.sum())
    assert 20 < n < 80
    assert seen == [(n, n, n)]
    assert torch.equal(y[~touched], x[~touched])


def test_babble_is_the_drawn_others_at_the_drawn_ratio_and_never_oneself() -> None:
    x = waves(5, 2, 1000) * torch.tensor([1.0, 0.1, 3, 1, 1])[:, None, None]
    lengths = torch.tensor([1000, 900, 1000, 500, 1000])
    effect = RandomBabble(2, (-5.0, 5.0), p=0.6)
    y, params = effect(x, lengths, generator=seeded(2), return_params=True)
    values = params.values
    assert 0 < int(values["apply"].sum()) < 5
    masked = x * (torch.arange(1000) < lengths[:, None])[:, None]
    for i, others in enumerate(values["voices"].tolist()):
        assert i not in others
        assert len(set(others)) == 2
        ends = lengths[i : i + 1]
        own, talk = masked[i : i + 1], masked[others].sum(0)[None]
        mixed = add_noise(own, talk, values["snr_db"][i], lengths=ends)
        expected = mixed if values["apply"][i] else own
        torch.testing.assert_close(y[i : i + 1], expected)
    everyone = RandomBabble(99).sample(4, 10, seeded()).values["voices"]
    assert [sorted(row) for row in everyone.tolist()] == [
        [1, 2, 3],
        [0, 2, 3],
        [0, 1, 3],
        [0, 1, 2],
    ]
    assert torch.equal(RandomBabble()(x[:1]), x[:1])
    with pytest.raises(InputError, match="replay the batch as it was"):
        effect(x[:2], params=params[:2])


def test_a_random_room_is_the_drawn_response() -> None:
    x = waves(6, 1, 300)
    y, params = RandomRoom(ROOMS)(x, generator=seeded(), return_params=True)
    drawn = params.values["response"].tolist()
    assert set(drawn) == {0, 1}
    for i, place in enumerate(drawn):
        torch.testing.assert_close(y[i], convolve_room(x[i], ROOMS[place]))


def test_noise_is_band_passed_and_goes_through_its_own_chain() -> None:
    white = [waves(16_000, seed=3)]
    x = waves(2, 1, 8000, seed=4)
    low = RandomNoise(white, 0.0, band_hz=(80, 240), sample_rate=16_000)
    added = low(x, generator=seeded()) - x
    spectrum = torch.fft.rfft(added[0, 0].double()).abs().square()
    hertz = torch.fft.rfftfreq(8000, 1 / 16_000)
    assert spectrum[(hertz < 700)].sum() / spectrum.sum() > 0.999
    chained = RandomNoise(white, 0.0, chain=RandomTimeDrop(16_000, 400.0, count=4))
    y, params = chained(x, generator=seeded(), return_params=True)
    silent = y[0, 0] == x[0, 0]
    for start, span in zip(
        params.values["chain.starts"][0].tolist(),
        params.values["chain.durations"][0].tolist(),
        strict=True,
    ):
        assert silent[start : start + span].all()
    assert silent.double().mean() < 0.9
    with pytest.raises(InputError, match="sample_rate"):
        RandomNoise(white, band_hz=(80, 240))


def test_frequency_drop_is_band_rejection_again_and_again() -> None:
    x = waves(3, 1, 4000).double()
    low = torch.tensor([[500.0, 2000], [100, 900], [700, 700]])
    high = torch.tensor([[900.0, 3000], [600, 900], [700, 700]])
    y = frequency_drop(x, RATE, low, high)
    twice = band_reject(band_reject(x[0], RATE, 500, 900), RATE, 2000, 3000)
    # Where the first filter cuts the clip's ends, the second knows it and the cascade does not.
    torch.testing.assert_close(y[0, :, 400:-400], twice[:, 400:-400], atol=1e-9, rtol=0)
    torch.testing.assert_close(y[1], band_reject(x[1], RATE, 100, 600), atol=1e-9, rtol=0)
    torch.testing.assert_close(y[2], x[2], atol=1e-12, rtol=0)
    drawn = RandomFrequencyDrop(RATE, (1, 4), 0.2).sample(5000, 10, seeded()).values
    used = drawn["high_hz"] > drawn["low_hz"]
    assert used.sum(1).unique().tolist() == [1, 2, 3, 4]
    assert (drawn["high_hz"] - drawn["low_hz"]).max().item() == pytest.approx(800)
    assert drawn["high_hz"].max() < RATE / 2


def test_speed_and_tempo_keep_the_batch_and_tell_where_clips_end() -> None:
    x = waves(2, 1, 4000)
    lengths = torch.tensor([3000, 4000])
    fast_slow = torch.tensor([1.25, 0.8]).double()
    params = Params({"apply": torch.tensor([True, True]), "factor": fast_slow})
    for effect, plain in (
        (RandomSpeed(), speed(x, fast_slow, lengths=lengths)[0]),
        (RandomTempo(RATE), tempo(x, RATE, fast_slow, lengths=lengths)[0]),
    ):
        y = effect(x, lengths, params=params)
        assert y.shape == x.shape
        torch.testing.assert_close(y, plain[:, :, :4000])
        ends = effect.ends(lengths, params, 4000)
        assert ends.tolist() == [2400, 4000]
        assert y[0, 0, 2400:].abs().max() == 0
        mapped = remap_times(lengths[:1].double(), fast_slow[:1])
        assert mapped.tolist() == [ends[0].item()]
    # What comes next in a chain knows the new end: noise does not go on behind it.
    chain = Chain([RandomSpeed(1.25), RandomNoise(BANK)])
    y, params = chain(x, lengths, generator=seeded(), return_params=True)
    assert chain.ends(lengths, params, 4000).tolist() == [2400, 3200]
    assert y[1, 0, 3200:].abs().max() == 0
    assert y[1, 0, 3190:3200].abs().max() > 0
    idle = RandomSpeed(1.25, p=0.0)
    assert idle.ends(lengths, idle.sample(2, lengths), 4000).tolist() == [3000, 4000]


@pytest.mark.parametrize("slow", [RandomSpeed(0.8), RandomTempo(RATE, 0.8)], ids=name_of)
def test_what_slows_down_grows_into_the_padding_behind_it(slow: Augmentation) -> None:
    x = waves(3, 1, 3000)
    lengths = torch.tensor([2000, 2900, 3000])
    plain = speed if isinstance(slow, RandomSpeed) else partial(tempo, sample_rate=RATE)
    whole, _ = plain(x, factor=0.8, lengths=lengths)
    y, params = slow(x, lengths, return_params=True)
    assert slow.ends(lengths, params, 3000).tolist() == [2500, 3000, 3000]
    torch.testing.assert_close(y, whole[:, :, :3000])
    assert y[0, 0, 2050:2100].abs().max() > 0
    # What follows in a chain goes on to the new end.
    y, params = Chain([slow, RandomNoise(BANK), slow])(x, lengths, return_params=True)
    noisy = Chain([slow, RandomNoise(BANK)])(
        x, lengths, params=Params({k: v for k, v in params.values.items() if k[0] != "2"})
    )
    torch.testing.assert_close(
        y, plain(noisy, factor=0.8, lengths=torch.tensor([2500, 3000, 3000]))[0][:, :, :3000]
    )


def test_a_batch_of_most_samples_cuts_nothing_off() -> None:
    slow = RandomSpeed((0.5, 1.5))
    effects = [slow, RandomSpliceOut(RATE), RandomTempo(RATE, (0.7, 1.1)), slow]
    for chain, most in (
        (Chain(effects), 5714),
        (SomeOf(2, effects), 4000),
        (OneOf(effects), 2000),
        (Chain([RandomClip(), OneOf([RandomSpeed(1.2)])]), 1000),
    ):
        assert chain.most_samples(1000) == most
        params = chain.sample(500, 1000, seeded(), time=most)
        lengths = torch.full((500,), 1000)
        ends = chain.ends(lengths, params, most)
        assert torch.equal(ends, chain.ends(lengths, params, 9999))
        assert most * 0.5 < ends.max() <= most


@pytest.mark.parametrize(
    "effect",
    [RandomSpeed(10.0), RandomTempo(RATE, 9.9), RandomSpliceOut(RATE, 1000, count=5)],
    ids=name_of,
)
def test_nothing_becomes_empty_that_was_not(effect: Augmentation) -> None:
    lengths = torch.arange(5).repeat(40)
    y, params = effect(waves(200, 1, 9), lengths, generator=seeded(), return_params=True)
    ends = effect.ends(lengths, params, 9)
    assert torch.equal(ends > 0, lengths > 0)
    assert y.isfinite().all()


def test_drops_filled_with_noise_keep_the_local_level() -> None:
    level = torch.where(torch.arange(8000) < 4000, 0.01, 1.0)
    x = (waves(1, 1, 8000) * level).double()
    starts, spans = torch.tensor([[1000, 5000]]), torch.tensor([[2000, 2000]])
    y = time_drop(x, starts, spans, noise=normal_noise(torch.tensor([3]), 8000))
    for first in (1000, 5000):
        part = slice(first, first + 2000)
        assert not torch.allclose(y[..., part], x[..., part])
        ratio = y[..., part].square().mean() / x[..., part].square().mean()
        assert 10 * abs(math.log10(ratio.item())) < 0.5
        correlation = np.corrcoef(y[0, 0, part].numpy(), x[0, 0, part].numpy())[0, 1]
        assert abs(correlation) < 0.1
    kept = torch.ones(8000, dtype=torch.bool)
    kept[1000:3000] = kept[5000:7000] = False
    assert torch.equal(y[..., kept], x[..., kept])
    smooth = time_drop(
        torch.ones(400).double(), 100, 200, edge=40, noise=torch.ones(1, 400).double()
    )
    torch.testing.assert_close(smooth, torch.ones(400).double(), atol=1e-9, rtol=0)
    few = torch.autograd.gradcheck(
        lambda w: time_drop(w, 3, 4, edge=2, noise=normal_noise(torch.tensor([1]), 12)),
        waves(1, 1, 12).double().requires_grad_(),
    )
    assert few


def test_chunks_change_places_and_nothing_is_lost() -> None:
    x = torch.arange(20.0).expand(2, 1, 20)
    starts, order = torch.tensor([[1, 6, 15], [0, 4, 8]]), torch.tensor([[2, 0, 1], [0, 2, 1]])
    y = chunk_swap(x, starts, torch.tensor([3, 2]), order)
    expected = [*range(1), 15, 16, 17, 4, 5, 1, 2, 3, *range(9, 15), 6, 7, 8, 18, 19]
    assert y[0, 0].tolist() == expected
    assert y[1, 0].tolist() == [0, 1, 2, 3, 8, 9, 6, 7, 4, 5, *range(10, 20)]
    effect = RandomChunkSwap(4, 0.2)
    lengths = torch.tensor([100, 33]).repeat(500)
    values = effect.sample(1000, lengths, seeded()).values
    for i in range(1000):
        ends = [0, *(values["starts"][i] + values["sizes"][i]).tolist()]
        begins = [*values["starts"][i].tolist(), lengths[i].item()]
        assert all(a <= b for a, b in zip(ends, begins, strict=True))
    assert len({tuple(row) for row in values["order"].tolist()}) == 24
    ramp = torch.arange(1000.0)
    assert torch.equal(effect(ramp, generator=seeded()).sort()[0], ramp)
    with pytest.raises(InputError, match="permute"):
        chunk_swap(x, starts, 2, torch.zeros(2, 3).long())


def test_spliced_clips_are_what_is_left() -> None:
    x = torch.arange(1.0, 21).expand(2, 2, 20)
    starts, spans = torch.tensor([[2, 3], [0, 18]]), torch.tensor([[3, 4], [0, 9]])
    y, left = splice_out(x, starts, spans, lengths=torch.tensor([20, 15]))
    assert left.tolist() == [15, 15]
    assert y[0, 1].tolist() == [1, 2, *range(8, 21), *[0] * 5]
    assert y[1, 0].tolist() == [*range(1, 16), *[0] * 5]
    effect = RandomSpliceOut(1000, 10, count=2)
    out, params = effect(x, generator=seeded(3), return_params=True)
    assert torch.equal(effect.ends(torch.tensor([20, 20]), params, 20), (out[:, 0] > 0).sum(1))


def test_levels_are_what_was_drawn() -> None:
    x = waves(400, 1, 50)
    y, params = RandomGain((-20.0, -6.0))(x, generator=seeded(), return_params=True)
    torch.testing.assert_close(y, (x * 10 ** (params.values["db"] / 20)[:, None, None]).float())
    assert -20 <= params.values["db"].min() < params.values["db"].max() < -6
    y, params = RandomPolarity()(x, generator=seeded(), return_params=True)
    turned = params.values["apply"]
    assert 0.4 < turned.double().mean() < 0.6
    assert torch.equal(y, torch.where(turned[:, None, None], -x, x))
    kept = clip(x, 0.5, keep_peak=True)
    torch.testing.assert_close(kept.amax((1, 2)), x.amax((1, 2)))
    torch.testing.assert_close(kept, 2 * clip(x, 0.5))
    assert clip(x, 0.0, keep_peak=True).abs().max() == 0
    factor = RandomClip((0.0, 1.0), law="uniform").sample(9000, 9, seeded()).values["factor"]
    assert factor.mean().item() == pytest.approx(0.5, abs=0.01)
    flat = torch.full((3, 1, 100_000), 0.3 / 32)
    y = RandomDither(6)(flat, generator=seeded()) * 32
    assert torch.equal(y, y.round())
    assert y.mean().item() == pytest.approx(0.3, abs=0.01)
    assert y.var().item() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(y[0], y[1])


def test_noise_by_rows_has_its_laws_and_no_pattern() -> None:
    seeds = torch.tensor([0, 1, 2, 2**32 - 1])
    u = uniform_noise(seeds, 2, 50_000)
    assert torch.equal(u[2], uniform_noise(seeds[2:3], 2, 50_000)[0])
    edges = torch.linspace(0, 1, 51).double()
    counts = torch.histogram(u.flatten(), edges)[0]
    expected = u.numel() / 50
    # Chi-square of 49 degrees of freedom: 85.4 is its 99.9 % point.
    assert ((counts - expected) ** 2 / expected).sum() < 85.4
    flat = u.reshape(8, -1).numpy()
    between = np.corrcoef(flat) - np.eye(8)
    assert np.abs(between).max() < 5 / math.sqrt(50_000)
    for lag in (1, 2, 3, 64, 256):
        assert abs(np.corrcoef(flat[0][lag:], flat[0][:-lag])[0, 1]) < 5 / math.sqrt(50_000)
    g = normal_noise(seeds, 50_000)
    assert g.mean().abs() < 0.01
    assert g.var().item() == pytest.approx(1, abs=0.02)
    assert g.pow(4).mean().item() == pytest.approx(3, abs=0.1)


def test_wav2aug_recipes_draw_two_distinct_effects_of_the_best() -> None:
    names = [
        "RandomNoise",
        "RandomFrequencyDrop",
        "RandomTimeDrop",
        "RandomSpeed",
        "RandomClip",
        "RandomChunkSwap",
        "RandomBabble",
        "RandomGain",
        "RandomPolarity",
    ]
    for k in (3, 6, 9):
        chain = from_recipe(f"wav2aug-top{k}", RATE, BANK)
        assert [type(effect).__name__ for effect in chain.effects] == names[:k]
        n = 500
        values = chain.sample(n, 800, seeded()).values
        drawn = torch.stack([values[f"{place}.apply"] for place in range(min(k, 8))]).long()
        if k < 9:
            assert (drawn.sum(0) == 2).all()
        assert (drawn.double().mean(1) - 2 / k).abs().max() < 0.08
        assert len(values["0.snr_db"].unique()) == n
        y = chain(waves(6, 1, 900), generator=seeded())
        assert y.shape == (6, 1, 900)
        assert y.isfinite().all()


def test_augmented_views_stay_aligned_in_time() -> None:
    rate, frame = 16_000, 160
    time = torch.arange(2 * rate) / rate
    syllables = (torch.sin(2 * math.pi * 3.1 * time) * torch.sin(2 * math.pi * 1.3 * time)).clamp(0)
    x = (waves(2, 1, 2 * rate, seed=9) * syllables).clone()
    y = from_recipe("cpc2", rate, [waves(rate)])(x, generator=seeded())

    def envelopes(wave: Tensor) -> Tensor:
        level = wave[:, 0].unfold(1, frame, frame).square().mean(2).sqrt()
        return level - level.mean(1, keepdim=True)

    past, future = envelopes(y), envelopes(x)
    for i in range(2):
        lags = range(-20, 21)
        products = [(past[i, 20 + k : 180 + k] * future[i, 20:180]).sum().item() for k in lags]
        # Reverberation lags behind by a frame or two; a shift of the clip would show as more.
        assert abs(lags[int(np.argmax(products))]) <= 2


def test_a_chain_looks_for_nan_once_at_its_door(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    isfinite = Tensor.isfinite

    def counted(wave: Tensor) -> Tensor:
        looks.append(wave.device.type)
        return isfinite(wave)

    x = waves(2, 1, 900)
    monkeypatch.setattr(Tensor, "isfinite", counted)
    RandomPolarity(p=1.0)(x, generator=seeded())
    door = len(looks)
    Chain([RandomClip()])(x, generator=seeded())
    values = 1  # a factor is looked at too, on the CPU
    assert len(looks) == 2 * door + values
    with pytest.raises(InputError, match="NaN"):
        Chain([RandomClip()])(torch.full((9,), math.nan))
    with pytest.raises(InputError, match="NaN"):
        clip(torch.full((9,), math.nan), 1.0)


def test_bad_settings_are_named() -> None:
    for make, word in (
        (lambda: RandomRoom([]), "empty"),
        (lambda: RandomRoom([torch.zeros(5)]), "only zeros"),
        (lambda: RandomBabble(0), "voices 0"),
        (lambda: RandomNoise(BANK, None), "snr None"),
        (lambda: RandomNoise(BANK, [5, 15]), "snr"),
        (lambda: RandomGain((1.0, 2.0, 3.0)), "db"),
        (lambda: add_noise(waves(9), waves(9), None), "snr_db is None"),
        (lambda: RandomSpeed(0.0), "factor"),
        (lambda: RandomTempo(RATE, (1.2, 0.8)), "factor"),
        (lambda: RandomFrequencyDrop(RATE, 0), "drops nothing"),
        (lambda: RandomTimeDrop(RATE, count=(0, 0)), "drops nothing"),
        (lambda: RandomTimeDrop(RATE, fill="music"), "silence"),
        (lambda: RandomClip(law="square"), "triangular"),
        (lambda: RandomChunkSwap(1), "change places"),
        (lambda: RandomChunkSwap(4, 0.3), "share"),
        (lambda: RandomDither(30), "1..24"),
        (lambda: frequency_drop(waves(9), RATE, torch.ones(2), torch.ones(2)), "K"),
        (lambda: time_drop(waves(9), 1, 2, noise=torch.ones(3)), "noise"),
        (lambda: splice_out(waves(9), -1, 2), "starts"),
    ):
        with pytest.raises(InputError, match=word) as error:
            make()
        assert "\n" not in str(error.value)
    room = RandomRoom(ROOMS)
    drawn = Params({"apply": torch.tensor([True]), "response": torch.tensor([7])})
    with pytest.raises(InputError, match="beyond the bank's 2"):
        room(waves(9), params=drawn)


def test_a_chirp_still_rises_after_a_pitch_shift() -> None:
    time = torch.arange(RATE).double() / RATE
    chirp = torch.sin(2 * math.pi * (300 * time + 450 * time.square()))  # 300 to 1200 Hz
    for cents in (-300, 250):
        shifted = pitch_shift(chirp, RATE, cents)
        frames = shifted.unfold(0, 640, 320) * torch.hann_window(640).double()
        peaks = torch.fft.rfft(frames, 16 * 640).abs().argmax(1) * RATE / (16 * 640)
        middle = (torch.arange(len(peaks)) * 320 + 320) / RATE
        expected = (300 + 900 * middle) * 2 ** (cents / 1200)
        inner = slice(1, -3)
        assert (peaks[inner].diff() > 0).all()
        # A splice may sit 7.3 ms from its place, and 70 ms on it is 0.19 times as much behind.
        assert (peaks - expected)[inner].abs().max() < 0.021 * 900 * 2 ** (cents / 1200)


def test_gradients_pass_through_what_moves_and_weighs_samples() -> None:
    x = waves(2, 1, 60).double().requires_grad_()
    for effect in (
        RandomFrequencyDrop(RATE, 2),
        RandomSpeed(1.1),
        RandomSpliceOut(RATE, 2.0),
        RandomChunkSwap(3, 0.2),
        RandomGain(),
        RandomPolarity(p=1.0),
        RandomBabble(1),
    ):
        params = effect.sample(2, 60, seeded())
        assert torch.autograd.gradcheck(
            lambda w, e=effect, p=params: e(w, params=p), x, fast_mode=True
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("effect", every_effect(), ids=name_of)
def test_a_gpu_gives_what_the_processor_gives(effect: Augmentation) -> None:
    x = waves(6, 1, 4000)
    lengths = torch.tensor([4000, 3000, 4000, 1, 4000, 0])
    y, params = effect(x, lengths, generator=seeded(), return_params=True)
    z = effect.to("cuda")(x.to("cuda"), lengths, params=params).cpu()
    error = (y - z).double().square().sum() / y.double().square().sum()
    assert 10 * math.log10(error.item() + 1e-30) < -100


def test_the_shapes_inside_do_not_hang_on_what_was_drawn() -> None:
    chain = Chain(
        [
            RandomNoise(BANK, chain=RandomClip()),
            RandomRoom(ROOMS),
            RandomTimeDrop(RATE, count=(0, 2), fill="noise"),
            RandomSpliceOut(RATE),
            RandomChunkSwap(),
            RandomBabble(),
            RandomDither(),
        ]
    )
    x = waves(3, 1, 500)
    drawn = [chain.sample(3, 500, seeded(seed)) for seed in range(2)]
    shapes = []
    for params in drawn:
        with Shapes() as seen:
            chain(x, params=params)
        shapes.append(seen.found)
    assert len(shapes[0]) > 100
    assert shapes[0] == shapes[1]
