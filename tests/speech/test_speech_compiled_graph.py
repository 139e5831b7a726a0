"""Under torch.compile an effect is one graph: no other for another draw, nothing on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from remanence.errors import InputError
from remanence.speech.wavaugment import band_reject, resampling, reverb
from remanence.speech.wavaugment.chain import Chain, OneOf, SomeOf, TwoView, from_recipe
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.pieces import samples_left, splice_out
from remanence.speech.wavaugment.pitch import pitch_shift, speed, stretch_factors, tempo
from remanence.speech.wavaugment.random import (
    RandomBabble,
    RandomBandReject,
    RandomChunkSwap,
    RandomClip,
    RandomDither,
    RandomFrequencyDrop,
    RandomGain,
    RandomNoise,
    RandomPitch,
    RandomPolarity,
    RandomReverb,
    RandomRoom,
    RandomSpeed,
    RandomSpliceOut,
    RandomTempo,
    RandomTimeDrop,
)
from remanence.speech.wavaugment.trust import trusted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from remanence.speech.wavaugment.augmentation import Augmentation

RATE = 8000
TIME = 800
DRAWS = (  # of two seeds, and two sets of lengths
    (0, torch.tensor([TIME, 500, 700, TIME, 1, 0])),
    (1, torch.tensor([600, TIME, TIME, 799, 500, TIME])),
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def waves(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed)) * 0.1


BANK = [waves(5000, seed=1), waves(90, seed=2)]
ROOMS = [torch.tensor([0.1, 1, 0, 0.5]), torch.tensor([1.0, 0.3])]


def effects() -> dict[str, Augmentation | TwoView]:
    band = RandomNoise(BANK, band_hz=(80, 400), sample_rate=RATE, chain=RandomClip(p=0.5), p=0.5)
    return {
        "pitch": RandomPitch(RATE, p=0.5),
        "high pitch": RandomPitch(RATE, 300, 1500),
        "quick pitch": RandomPitch(RATE, quality="quick", search="quick"),
        "reverb": RandomReverb(RATE, reverberance=(0.0, 100.0), pre_delay_ms=(0.0, 20.0), p=0.5),
        "room": RandomRoom(ROOMS, p=0.5),
        "noise": RandomNoise(BANK, p=0.5),
        "wavaugment noise": RandomNoise(BANK, mix="wavaugment"),
        "rms_peak noise": RandomNoise(BANK, mix="rms_peak"),
        "noise in one piece": RandomNoise(BANK[:1]),
        "chained noise": band,
        "babble": RandomBabble(2, p=0.5),
        "band": RandomBandReject(RATE, p=0.5),
        "bands": RandomFrequencyDrop(RATE, p=0.5),
        "drop": RandomTimeDrop(RATE, count=(1, 3), edge_ms=2, fill="noise", p=0.5),
        "swap": RandomChunkSwap(3, 0.2, p=0.5),
        "splice": RandomSpliceOut(RATE, count=3, p=0.5),
        "speed": RandomSpeed((0.8, 1.25), p=0.5),
        "quick speed": RandomSpeed((0.8, 1.25), quality="quick"),
        "tempo": RandomTempo(RATE, (0.8, 1.25), p=0.5),
        "clip": RandomClip((0.2, 0.9), keep_peak=True, p=0.5),
        "gain": RandomGain(p=0.5),
        "polarity": RandomPolarity(),
        "dither": RandomDither(6, p=0.5),
        "shorter": Chain([RandomSpeed(p=0.5), RandomSpliceOut(RATE), RandomNoise(BANK)]),
        "one": OneOf([RandomGain(), RandomTimeDrop(RATE)]),
        "some": SomeOf(2, [RandomGain(), RandomRoom(ROOMS), RandomClip()], saturate=True),
        "two": TwoView(Chain([RandomGain(), RandomClip()]), "both"),
    }


EFFECTS = effects()


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def agree(compiled: Tensor, eager: Tensor, name: str) -> None:
    """Equal but for float32 rounding."""
    if "dither" in name:  # a rounding difference may turn a step over
        assert ((compiled - eager).abs() > 1e-6).double().mean() < 1e-3
        return
    error = (compiled - eager).double().square().sum() / eager.double().square().sum()
    assert error < 1e-10, f"{10 * error.log10():.0f} dB"


@pytest.mark.parametrize("name", EFFECTS)
def test_an_effect_is_one_graph_for_all_draws_and_lengths(name: str) -> None:
    effect, counter = EFFECTS[name], CompileCounter()
    compiled = torch.compile(effect, fullgraph=True, backend=counter)
    x = waves(6, 1, TIME)
    for seed, lengths in DRAWS:
        params = effect.sample(6, lengths, seeded(seed))
        # Replayed by eager code without the compiled kernels too: a splice is a choice, which
        # rounding might turn.
        eager = effect(x.double(), lengths, params=params)
        out = compiled(x, lengths, params=params)
        pairs = zip(out, eager, strict=True) if isinstance(out, tuple) else [(out, eager)]
        for one, other in pairs:
            agree(one, other, name)
    assert counter.frame_count == 1


def test_batches_of_another_size_and_waves_without_lengths_compile_too() -> None:
    chain = Chain([RandomSpeed(p=0.5), RandomGain()])
    compiled = torch.compile(chain, fullgraph=True, backend="eager")
    for shape in ((2, 1, 900), (3, 1, 900), (3, 2, 1000)):
        x = waves(*shape)
        params = chain.sample(shape[0], shape[2], seeded())
        agree(compiled(x, params=params), chain(x.double(), params=params), "")


def test_a_compiled_chain_trusts_what_an_eager_one_refuses() -> None:
    room = RandomRoom(ROOMS)
    broken = torch.full((2, 1, 50), torch.nan)
    params = room.sample(2, 50, seeded())
    with pytest.raises(InputError, match="NaN"):
        room(broken, params=params)
    assert torch.compile(room, fullgraph=True, backend="eager")(broken, params=params).isnan().all()
    assert not trusted()


ON_GPU = (  # no two with the same code
    *("pitch", "quick pitch", "reverb", "room", "noise", "chained noise", "babble", "band"),
    *("bands", "drop", "swap", "splice", "speed", "tempo", "clip", "gain", "dither", "shorter"),
)


class Replay(nn.Module):
    """Takes parameters as tensors, so that they may be fake."""

    def __init__(self, effect: Augmentation | TwoView) -> None:
        super().__init__()
        self.effect = effect

    def forward(self, wave: Tensor, lengths: Tensor, values: dict[str, Tensor]) -> Tensor:
        return self.effect(wave, lengths, params=Params(values))


@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_nothing_goes_to_the_processor_or_comes_from_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No GPU is needed: tensors are fake, and only their shapes and devices are followed.
    effect = effects()[name]
    seed, lengths = DRAWS[0]
    params = effect.sample(6, lengths, seeded(seed))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    devices: dict[str, str] = {}

    @torch.compiler.assume_constant_result
    def constant(table, device):
        with fake:
            return table().to(device)

    def record(module: torch.fx.GraphModule, _: list[Tensor]):
        for node in module.graph.nodes:
            if isinstance(node.meta.get("val"), Tensor):
                devices[node.name] = node.meta["val"].device.type
            # What hands a value to Python, or has a size that only the values tell, waits.
            assert "_local_scalar_dense" not in str(node.target)
            assert "nonzero" not in str(node.target)
        return module.forward

    for module in (band_reject, resampling, reverb):
        monkeypatch.setattr(module, "constant", constant)
    with fake:
        replay = Replay(effect.to("cuda"))
        values = {k: v.to("cuda") for k, v in params.values.items()}
        x = torch.empty(6, 1, TIME, device="cuda")
        backend = aot_autograd(fw_compiler=record)
        torch.compile(replay, fullgraph=True, backend=backend)(x, lengths.to("cuda"), values)
    assert len(devices) > len(values) + 2
    assert {k: v for k, v in devices.items() if v != "cuda"} == {}


def test_stretch_factors_are_the_six_digits_that_sox_reads() -> None:
    cents = torch.arange(-7972, 3987)
    digits = [float(f"{2 ** (-c / 1200):.6g}") for c in cents.tolist()]
    assert stretch_factors(cents.double()).tolist() == digits


def test_bounds_fix_the_sizes_and_hold_the_values() -> None:
    x = waves(2, 1, TIME)
    some = torch.tensor([-100.0, 50.0])
    torch.testing.assert_close(
        pitch_shift(x, RATE, some, bounds=(-300, 1500)), pitch_shift(x, RATE, some)
    )
    factors = torch.tensor([0.9, 1.2])
    for played, plain in (
        (speed(x, factors, bounds=(0.5, 3.0)), speed(x, factors)),
        (tempo(x, RATE, factors, bounds=(0.5, 3.0)), tempo(x, RATE, factors)),
    ):
        assert played[0].shape[2] == 2 * TIME
        assert torch.equal(played[1], plain[1])
        torch.testing.assert_close(played[0][..., : plain[0].shape[2]], plain[0])
    for call in (
        lambda: pitch_shift(x, RATE, some, bounds=(-50, 50)),
        lambda: speed(x, factors, bounds=(1.0, 2.0)),
    ):
        with pytest.raises(InputError, match=r"lies outside"):
            call()


def test_the_samples_that_splices_leave_are_counted_without_a_clock() -> None:
    generator = seeded(3)
    starts = torch.randint(0, 30, (500, 4), generator=generator)
    spans = torch.randint(0, 12, (500, 4), generator=generator)
    lengths = torch.randint(0, 31, (500,), generator=generator)
    _, left = splice_out(torch.ones(500, 1, 30), starts, spans, lengths=lengths)
    assert torch.equal(samples_left(starts, spans, lengths), left)


@pytest.mark.slow
def test_a_compiled_chain_gives_what_it_gives_uncompiled() -> None:
    chain = from_recipe("cpc2", RATE, BANK)
    x = waves(6, 1, TIME)
    # One thread, as a pool of compiling processes outlives the test.
    compiled = torch.compile(chain, fullgraph=True, options={"compile_threads": 1})
    for seed, lengths in DRAWS:
        params = chain.sample(6, lengths, seeded(seed))
        agree(compiled(x, lengths, params=params), chain(x.double(), lengths, params=params), "")
