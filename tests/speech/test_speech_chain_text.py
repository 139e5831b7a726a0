"""A wrong chain in text is answered in its own words, at its own place."""

import re

import pytest
import torch

from remanence.errors import InputError
from remanence.speech.wavaugment.chain import RECIPES
from remanence.speech.wavaugment.chain_text import OPTIONS, from_text


def said(text: str) -> str:
    with pytest.raises(InputError) as caught:
        from_text(text, 16000, lambda _: torch.ones(1, 9))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"chain {text!r}, ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ptich", "column 1: 'ptich' is no effect: did you mean pitch?"),
        ("clip,timedrop[3]", "column 6: 'timedrop' is no effect: did you mean drop?"),
        ("Reverb", "column 1: 'Reverb' is no effect: did you mean reverb?"),
        ("clip2", "column 1: 'clip2' is no effect: did you mean clip?"),
        ("cpc", "column 1: 'cpc' is no effect: did you mean the recipe cpc2?"),
        ("cpc3", "column 1: 'cpc3' is no effect: did you mean the recipe cpc2?"),
        ("wav2aug_top3", "'wav2aug_top3' is no effect: did you mean the recipe wav2aug-top3?"),
        ("cpc2,reverb", "column 1: 'cpc2' is a recipe and stands alone, outside of chains"),
        ("oneof[[clip,cpc2-community]]", "column 13: 'cpc2-community' is a recipe"),
        ("wav2aug-top9", "column 1: 'wav2aug-top9' is a recipe for Python alone, from_recipe"),
    ],
)
def test_a_word_that_is_no_effect_is_answered_with_what_may_be_meant(text: str, words: str) -> None:
    assert words in said(text)


def test_where_nothing_is_near_all_effects_and_recipes_are_named() -> None:
    answer = said("karaoke")
    for name in [*OPTIONS, *RECIPES]:
        assert (name in answer) == (name != "wav2aug-top9")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clip,reverb[room=0:200]", "column 18: reverb: room 0:200 lies outside 0..100"),
        ("reverb[ depth = -5 ]", "column 17: reverb: depth -5 lies outside 0..100"),
        ("drop[-5]", "column 6: drop: ms -5 lies outside"),
        ("drop[nan]", "column 6: drop: ms nan lies outside"),
        ("drop[count=0]", "column 12: drop: count 0 drops nothing"),
        ("pitch[-9999]", "column 7: pitch: cents -9999 lies outside -3600..3600"),
        ("pitch[12.5]", "column 7: pitch: cents 12.5 is not whole"),
        ("clip[1,p=2]", "column 10: clip: p 2 is no probability: give 0..1"),
        ("someof[5,of=[pitch,clip]]", "column 8: someof: k 5 is not 1 to 2"),
        ("oneof[[pitch,clip[2]]]", "column 19: clip: factor 2 lies outside"),
        ("bandreject[transition=-1]", "column 23: bandreject: transition -1 lies outside 0..8000"),
        ("freqdrop[transition=8001]", "column 21: freqdrop: transition 8001 lies outside 0..8000"),
        ("dither[99]", "column 8: dither: bits 99 lies outside 1..24"),
        ("reverb[room=big]", "column 13: 'big' is no number"),
        ("noise[dir=x,band=80]", "column 18: '80' does not fit: give low:high"),
    ],
)
def test_a_value_out_of_range_is_named_and_pointed_at_as_the_text_has_it(
    text: str, words: str
) -> None:
    assert said(text).startswith(words)


@pytest.mark.parametrize("text", ["pitch[300:-300]", "noise[dir=x,band=300:-300]"])
def test_a_range_the_wrong_way_round_is_turned(text: str) -> None:
    column = text.index("300") + 1
    assert said(text) == f"column {column}: '300:-300' runs from high to low: write -300:300"


def test_brackets_nest_as_deep_as_anyone_needs_and_no_deeper() -> None:
    def nested(depth: int) -> str:
        return "oneof[[" * depth + "clip" + "]]" * depth

    from_text(nested(25), 16000)(torch.ones(20))
    assert re.fullmatch(r"column \d+: more than 50 brackets .*: write fewer", said(nested(300)))
    assert "more than 50 brackets" in said("[" * 5000)
