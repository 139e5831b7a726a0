"""Random effects and chains: draws, replay, masks, views, and chains written as text."""

import math
import re

import pytest
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment import random
from remanence.speech.wavaugment.augmentation import Augmentation
from remanence.speech.wavaugment.band_reject import to_mel
from remanence.speech.wavaugment.chain import Chain, OneOf, SomeOf, TwoView, from_recipe
from remanence.speech.wavaugment.chain_text import OPTIONS, from_text
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.pitch import pitch_shift
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
from remanence.speech.wavaugment.reverb import reverb

RATE = 8000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def waves(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed)) * 0.1


BANK = [waves(700, seed=1), waves(90, seed=2), waves(5000, seed=3)]


def every_effect() -> list[Augmentation]:
    return [
        RandomPitch(RATE),
        RandomNoise(BANK),
        RandomReverb(RATE, reverberance=(0.0, 100.0)),
        RandomBandReject(RATE),
        RandomTimeDrop(RATE, count=2),
        RandomClip(),
    ]


@pytest.mark.parametrize("effect", [*every_effect(), Chain(every_effect())])
def test_rows_differ_repeat_by_seed_and_replay_bit_for_bit(effect: Augmentation) -> None:
    x = waves(1, 1, 2400).repeat(6, 1, 1)
    lengths = torch.tensor([2400, 2000, 2400, 900, 2400, 1])
    y, params = effect(x, lengths, generator=seeded(), return_params=True)
    assert y.shape == x.shape
    assert not torch.equal(y[0], y[2])
    assert not torch.equal(y[2], y[4])
    assert torch.equal(effect(x, lengths, generator=seeded()), y)
    assert not torch.equal(effect(x, lengths, generator=seeded(1)), y)
    reread = Params.from_json(params.to_json())
    assert reread.values.keys() == params.values.keys()
    for name, value in params.values.items():
        assert torch.equal(reread.values[name], value)
        assert reread.values[name].dtype == value.dtype
    assert torch.equal(effect(x, lengths, params=reread), y)
    for i, n in enumerate(lengths.tolist()):
        assert y[i, :, n:].abs().sum() == 0


@pytest.mark.parametrize("effect", [*every_effect(), Chain(every_effect())])
def test_rows_of_the_parameters_give_rows_of_the_output(effect: Augmentation) -> None:
    x = waves(5, 1, 2400)
    y, params = effect(x, generator=seeded(), return_params=True)
    parts = [effect(x[:2], params=params[:2]), effect(x[2:], params=params[2:])]
    torch.testing.assert_close(torch.cat(parts), y, atol=1e-5, rtol=0)
    rows = torch.tensor([3, 0])
    torch.testing.assert_close(effect(x[rows], params=params[rows]), y[rows], atol=1e-5, rtol=0)
    torch.testing.assert_close(effect(x[4], params=params[-1]), y[4], atol=1e-5, rtol=0)
    both = Params.cat([params[:2], params[2:]])
    assert torch.equal(effect(x, params=both), y)


@pytest.mark.parametrize("effect", every_effect())
def test_ragged_rows_equal_trimmed_clips(effect: Augmentation) -> None:
    x = waves(3, 2, 2400) + 0.05
    lengths = torch.tensor([2400, 1700, 2000])
    y, params = effect(x, lengths, generator=seeded(), return_params=True)
    for i, n in enumerate(lengths.tolist()):
        trimmed = effect(x[i, :, :n], params=params[i])
        # How a pitch shift ends hangs on what follows: nothing is defined within its last segment.
        sure = n - 656 if isinstance(effect, RandomPitch) else n
        torch.testing.assert_close(y[i, :, :sure], trimmed[:, :sure], atol=1e-5, rtol=0)


def test_gradients_flow_through_a_chain() -> None:
    x = waves(4, 1, 1200).requires_grad_()
    Chain([RandomReverb(RATE, p=0.5), *every_effect()])(x, generator=seeded()).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad.abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize("effect", every_effect())
def test_silence_stays_finite_and_eval_is_identity(effect: Augmentation) -> None:
    silence = torch.zeros(2, 1, 900)
    assert effect(silence, generator=seeded()).abs().max() == 0
    x = waves(2, 1, 900)
    effect.eval()
    y, params = effect(x, return_params=True)
    assert y is x
    effect.train()
    assert torch.equal(effect(x, params=params), x)
    effect.eval()
    effect.always = True
    assert not torch.equal(effect(x, generator=seeded()), x)


def test_probability_touches_a_share_of_rows_and_leaves_the_others_bit_for_bit() -> None:
    effect = RandomReverb(RATE, p=0.3)
    x = waves(400, 1, 64)
    y, params = effect(x, generator=seeded(), return_params=True)
    touched = params.values["apply"]
    assert 0.2 < touched.double().mean() < 0.4
    assert torch.equal(y[~touched], x[~touched])
    room = params.values["room"][touched]
    torch.testing.assert_close(y[touched], reverb(x[touched], RATE, room=room))


def test_draws_have_their_published_laws() -> None:
    n = 20_000
    cents = RandomPitch(RATE).sample(n, 100, seeded()).values["cents"]
    assert (cents.min(), cents.max()) == (-300, 299)
    room = RandomReverb(RATE).sample(n, 100, seeded()).values["room"]
    assert room.unique().tolist() == list(range(100))
    bands = RandomBandReject(16000).sample(n // 4, 100, seeded()).values
    low, high = to_mel(bands["low_hz"]), to_mel(bands["high_hz"])
    assert low.min() >= 0
    assert bands["high_hz"].max() < 8000
    assert (high - low).max().item() == pytest.approx(299.5, abs=1)
    assert (high - low).mean().item() == pytest.approx(299.5 / 2, abs=3)
    assert bands["depth_db"].max() < 1
    factor = RandomClip((0.4, 1.0)).sample(n, 100, seeded()).values["factor"]
    assert factor.mean().item() == pytest.approx(0.8, abs=0.005)
    assert 0.4 <= factor.min() <= factor.max() <= 1


def test_drops_and_noise_offsets_reach_every_place_that_fits() -> None:
    n = 20_000
    lengths = torch.tensor([3, 20]).repeat(n // 2)
    values = RandomTimeDrop(1000, 6).sample(n, lengths, seeded()).values
    spans, starts = values["durations"][:, 0], values["starts"][:, 0]
    assert spans[0::2].unique().tolist() == [0, 1, 2, 3]
    assert spans[1::2].unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert (starts + spans <= lengths).all()
    assert starts[1::2][spans[1::2] == 5].unique().tolist() == list(range(16))
    bank = RandomNoise([torch.ones(5), torch.ones(30)])
    drawn = bank.sample(n, torch.full((n,), 20), seeded()).values
    assert drawn["offset"][drawn["clip"] == 0].unique().tolist() == list(range(5))
    assert drawn["offset"][drawn["clip"] == 1].unique().tolist() == list(range(11))


def test_noise_comes_from_the_drawn_clip_and_place() -> None:
    effect = RandomNoise([torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20])], 0.0)
    effect.mix = "wavaugment"
    values = {"clip": [0, 1], "offset": [2, 1]}
    params = Params(
        {
            "apply": torch.tensor([True, True]),
            **{name: torch.tensor(value) for name, value in values.items()},
            "snr_db": torch.zeros(2).double(),
        }
    )
    x = torch.ones(2, 1, 5)
    added = 2 * effect(x, params=params) - x
    assert added[:, 0].tolist() == [[3, 1, 2, 3, 1], [20, 10, 20, 10, 20]]


def test_a_chain_runs_in_order_with_its_members_parameters() -> None:
    chain = Chain([RandomPitch(RATE), RandomReverb(RATE)])
    x = waves(3, 1, 2400)
    y, params = chain(x, generator=seeded(), return_params=True)
    by_hand = pitch_shift(x, RATE, params.values["0.cents"].double())
    by_hand = reverb(by_hand, RATE, room=params.values["1.room"])
    torch.testing.assert_close(y, by_hand)
    assert Chain([RandomReverb(RATE)], saturate=True)(100 * x).abs().max() <= 1


def test_one_of_and_some_of_touch_each_row_by_their_number_of_effects() -> None:
    effects = [RandomClip(), Chain([RandomReverb(RATE), RandomClip()]), RandomTimeDrop(RATE)]
    n = 3000
    for chain, k in ((OneOf(effects), 1), (SomeOf(2, effects), 2)):
        values = chain.sample(n, 500, seeded()).values
        assert torch.equal(values["1.0.apply"], values["1.1.apply"])
        chosen = torch.stack([values["0.apply"], values["1.0.apply"], values["2.apply"]]).long()
        assert (chosen.sum(0) == k).all()
        assert (chosen.double().mean(1) - k / 3).abs().max() < 0.04
    x = waves(8, 1, 500)
    y, params = OneOf(effects)(x, generator=seeded(), return_params=True)
    only = params.values["2.apply"]
    kept = y[only] == x[only]
    assert (kept | (y[only] == 0)).all()


def test_what_follows_a_change_of_length_is_drawn_on_the_new_length() -> None:
    x = waves(200, 1, 4000)
    half = Chain([RandomSpeed(2.0), RandomChunkSwap(2, 0.5)])
    y, params = half(x, generator=seeded(), return_params=True)
    kept = half.effects[0](x, params=params.under("0")).sort(-1)[0]
    torch.testing.assert_close(y.sort(-1)[0], kept)  # swapped, and nothing lost
    lengths = torch.tensor([1000, 3200]).repeat(500)
    pace, drop = RandomSpeed((0.5, 2.0)), RandomTimeDrop(RATE, 1000)
    for chain in (
        Chain([pace, RandomSpliceOut(RATE), drop]),
        Chain([Chain([pace, RandomSpliceOut(RATE)]), drop]),
        SomeOf(2, [pace, RandomSpliceOut(RATE), drop]),
        Chain([OneOf([pace, RandomGain()]), drop]),
    ):
        generator = seeded()
        params = chain.sample(1000, lengths, generator, time=4000)
        ends = chain.ends(lengths, params, 4000)  # no drop moves an end
        last = str(len(chain.effects) - 1)
        drawn = params.under(last).values
        stops = (drawn["starts"] + drawn["durations"])[:, 0]
        assert (stops <= ends).all()
        assert ((stops > 3200) & (lengths == 3200)).any()
        if type(chain) is Chain:
            again = seeded()
            for effect in chain.effects:
                effect.sample(1000, lengths, again)
            assert torch.equal(again.get_state(), generator.get_state())


def test_a_chain_cuts_off_at_full_scale_after_each_effect() -> None:
    x = torch.tensor([0.05, 0.3, -0.9])
    chain = Chain([RandomGain((20, 20)), RandomGain((-20, -20))], saturate=True)
    torch.testing.assert_close(chain(x), torch.tensor([0.05, 0.1, -0.1]))


def test_two_views_are_where_their_mode_says() -> None:
    x = waves(4, 1, 600)
    chain = RandomReverb(RATE)
    for mode in ("past", "future", "both", "same"):
        view = TwoView(chain, mode)
        past, future = view(x, generator=seeded())
        assert (past is x) == (mode == "future")
        assert (future is x) == (mode == "past")
        assert (past is future) == (mode == "same")
        params = view.sample(4, 600, seeded())
        again = view(x, params=Params.from_json(params.to_json()))
        assert torch.equal(again[0], past)
        assert torch.equal(again[1], future)
        view.eval()
        assert all(copy is x for copy in view(x))
        view.train()
    past, future = TwoView(chain, "both")(x, generator=seeded())
    assert not torch.equal(past, future)


def test_recipes_hold_their_published_ranges() -> None:
    n = 5000
    paper = from_recipe("cpc2", RATE, BANK).sample(n, 500, seeded()).values
    assert (paper["0.cents"].min(), paper["0.cents"].max()) == (-300, 299)
    assert 5 <= paper["1.snr_db"].min() < 5.1
    assert 14.9 < paper["1.snr_db"].max() <= 15
    assert (paper["2.reverberance"] == 50).all()
    assert (paper["2.damping"] == 50).all()
    later = from_recipe("cpc2-community", RATE, BANK).sample(n, 500, seeded()).values
    assert later["1.snr_db"].max() > 19.9
    assert (later["2.damping"] == 100).all()
    assert later["2.reverberance"].max() > 99
    assert from_recipe("cpc2-community", RATE, BANK)(waves(2, 1, 900)).shape == (2, 1, 900)
    with pytest.raises(InputError, match="cpc2-community"):
        from_recipe("cpc3", RATE, BANK)


def test_a_chain_in_text_is_the_chain_in_python() -> None:
    asked = []

    def open_noise(name: str) -> list[Tensor]:
        asked.append(name)
        return BANK

    text = (
        "pitch[-300:300], noise[dir=a/b c,snr=5:15] ,reverb[room=0:100,p=0.5],"
        "bandreject[2],drop[50,count=3],clip[0.5:1],reverb"
    )
    x = waves(3, 1, 2400)
    python = Chain(
        [
            RandomPitch(RATE),
            RandomNoise(BANK, (5.0, 15.0)),
            RandomReverb(RATE, p=0.5),
            RandomBandReject(RATE, 2.0),
            RandomTimeDrop(RATE, 50, count=3),
            RandomClip((0.5, 1.0)),
            RandomReverb(RATE),
        ]
    )
    chain = from_text(text, RATE, open_noise)
    assert asked == ["a/b c"]
    assert torch.equal(chain(x, generator=seeded()), python(x, generator=seeded()))
    quick = from_text("pitch[100,quality=quick,search=quick]", RATE)(x)
    assert torch.equal(quick, pitch_shift(x, RATE, 100, quality="quick", search="quick"))


def test_noise_without_a_folder_takes_the_one_given() -> None:
    asked: list[str] = []

    def open_noise(name: str) -> torch.Tensor:
        asked.append(name)
        return BANK

    from_text("noise,noise[dir=a,chain=[noise[3]]]", RATE, open_noise, noise="given")
    assert asked == ["given", "given", "a"]
    with pytest.raises(InputError, match="room: dir is missing"):
        from_text("noise,room", RATE, open_noise, noise="given")


def test_every_effect_and_nested_chains_can_be_written() -> None:
    text = (
        "speed[0.9:1.1,quality=quick],tempo[1.1,search=quick],room[dir=rooms,align=no,energy=no],"
        "noise[5,dir=n,band=80:400,chain=[reverb[room=20],clip]],babble[0:5,voices=2],"
        "freqdrop[1:2,width=0.2,transition=50],drop[50,count=1:3,edge=3,fill=noise],"
        "splice[20,count=2],swap[3,share=0.1],clip[0:1,law=uniform,peak=yes],gain[-6:0],polarity,"
        "dither[8,p=0.5],oneof[[pitch[100],reverb]],someof[2, of=[ pitch , clip[0.5] ,drop[9]]]"
    )
    python = Chain(
        [
            RandomSpeed((0.9, 1.1), quality="quick"),
            RandomTempo(RATE, 1.1, search="quick"),
            RandomRoom(BANK, align=False, unit_energy=False),
            RandomNoise(
                BANK,
                5.0,
                band_hz=(80, 400),
                sample_rate=RATE,
                chain=Chain([RandomReverb(RATE, room=20), RandomClip()]),
            ),
            RandomBabble(2, (0.0, 5.0)),
            RandomFrequencyDrop(RATE, (1, 2), 0.2, transition_hz=50),
            RandomTimeDrop(RATE, 50, count=(1, 3), edge_ms=3, fill="noise"),
            RandomSpliceOut(RATE, 20, count=2),
            RandomChunkSwap(3, 0.1),
            RandomClip((0, 1), law="uniform", keep_peak=True),
            RandomGain((-6, 0)),
            RandomPolarity(),
            RandomDither(8, p=0.5),
            OneOf([RandomPitch(RATE, 100, 100), RandomReverb(RATE)]),
            SomeOf(2, [RandomPitch(RATE), RandomClip(0.5), RandomTimeDrop(RATE, 9)]),
        ]
    )
    written = from_text(text, RATE, lambda _: BANK)
    x = waves(3, 1, 900)
    ours, params = written(x, generator=seeded(), return_params=True)
    theirs, expected = python(x, generator=seeded(), return_params=True)
    assert params.values.keys() == expected.values.keys()
    assert torch.equal(ours, theirs)
    kinds = {type(effect) for effect in every_effect()}
    assert kinds | {type(effect) for effect in python.effects} == {
        *(getattr(random, name) for name in random.__all__),
        OneOf,
        SomeOf,
    }
    assert set(re.findall("[a-z]+", text)) >= set(OPTIONS) - {"bandreject"}


@pytest.mark.parametrize(
    ("text", "column", "word"),
    [
        ("", 1, "must stand here"),
        ("pitch,", 7, "must stand here"),
        ("pitch,nois[5]", 7, "'nois' is no effect"),
        ("pitch[-300:300", 6, "never closed"),
        ("pitch[1]reverb", 9, "put ','"),
        ("pitch,reverb[ size=3]", 15, "no option 'size'"),
        ("reverb[room=3,50]", 15, "needs its name"),
        ("reverb[3,room=5]", 10, "twice"),
        ("reverb[room=big]", 13, "'big' is no number"),
        ("reverb[room=1:2:3]", 13, "low:high"),
        ("clip[1], bandreject[1:2]", 21, "one number"),
        ("pitch[quality=best]", 15, "high, quick"),
        ("clip[1],reverb[room=90:10]", 21, "90:10"),
        ("noise[5]", 1, "dir is missing"),
        ("noise[dir=x]", 1, "open_noise"),
        ("noise[dir=]", 11, "name must follow"),
        ("clip[2]", 6, "factor"),
        ("clip[1,p=2]", 10, "no probability"),
        ("clip[nan]", 6, "factor"),
        ("pitch[12.5]", 7, "whole"),
        ("reverb[0:9.5]", 8, "whole"),
        ("clip,oneof[[pitch,clop]]", 19, "'clop' is no effect"),
        ("oneof[[pitch,clip[2]]]", 19, "factor"),
        ("oneof[pitch,clip]", 7, "brackets of its own"),
        ("oneof", 1, "effects are missing"),
        ("someof[5,of=[pitch,clip]]", 8, "k 5"),
        ("oneof[[pitch,clip],p=1]", 20, "no option 'p'"),
        ("oneof[[pitch,clip]", 6, "never closed"),
        ("oneof[[pitch]x]", 14, "'x' after ']'"),
        ("noise[dir=x,band=80]", 18, "low:high"),
        ("swap[2.5]", 6, "no whole number"),
        ("dither[16,yes]", 11, "needs its name"),
        ("clip[1]]", 8, "closes nothing"),
        ("clip]", 5, "closes nothing"),
        ("room", 1, "room[dir=folder]"),
        ("drop[50,fill=music]", 14, "silence, noise"),
    ],
)
def test_a_wrong_text_is_named_with_its_column(text: str, column: int, word: str) -> None:
    with pytest.raises(InputError, match=rf"column {column}: .*{re.escape(word)}") as error:
        from_text(text, RATE)
    assert "\n" not in str(error.value)


def test_bad_ranges_parameters_and_banks_are_named() -> None:
    x = waves(2, 1, 300)
    with pytest.raises(InputError, match="cents"):
        RandomPitch(RATE, 300, -300)
    with pytest.raises(InputError, match="bank is empty"):
        RandomNoise([])
    with pytest.raises(InputError, match="bank is empty or not mono"):
        RandomNoise([torch.ones(2, 5)])
    with pytest.raises(InputError, match="drops nothing"):
        RandomTimeDrop(RATE, 0)
    with pytest.raises(InputError, match="for 3 rows"):
        RandomClip()(x, params=RandomClip().sample(3, 300))
    with pytest.raises(InputError, match="replay them in"):
        Chain([RandomClip()])(x, params=RandomClip().sample(2, 300))
    with pytest.raises(InputError, match="k 3"):
        SomeOf(3, [RandomClip()])
    with pytest.raises(InputError, match="at least one"):
        Chain([])
    with pytest.raises(InputError, match="past"):
        TwoView(RandomClip(), "before")
    with pytest.raises(InputError, match="to_json"):
        Params.from_json('{"a": 3}')
    with pytest.raises(InputError, match="differ in name"):
        Params.cat([])
    with pytest.raises(InputError, match=r"\(8, 300\) .*unsqueeze\(1\)"):
        RandomClip()(torch.zeros(8, 300))  # else one draw would serve the whole batch
    with pytest.raises(InputError, match="NaN"):
        RandomClip()(torch.full((5,), math.nan))
