import numpy as np
import pytest
import torch

from remanence.claims.synthetic_speech import PAUSE, PHONES, WORDS, synthesise
from remanence.kit.audio import mfcc
from remanence.speech.abx.score import run


@pytest.fixture(scope="module")
def speech():
    return synthesise(0, voices=4, recordings=4, words=12)


def level(speech, phone, low, high):
    """Share of a phone's energy that lies between two frequencies, over all recordings."""
    inside = total = 0.0
    for name, wave in speech.waves.items():
        for onset, offset, label in speech.phones[name]:
            if label == phone:
                power = torch.fft.rfft(wave[onset:offset].double()).abs().square()
                hz = torch.linspace(0, speech.sample_rate / 2, len(power))
                inside += float(power[(hz >= low) & (hz < high)].sum())
                total += float(power.sum())
    return inside / total


def test_equal_seeds_give_equal_samples_and_others_others(speech):
    again = synthesise(0, voices=4, recordings=4, words=12)
    other = synthesise(1, voices=4, recordings=4, words=12)
    assert all(torch.equal(wave, again.waves[name]) for name, wave in speech.waves.items())
    assert speech.phones == again.phones
    assert speech.words != other.words


def test_alignments_tile_each_recording_and_spell_its_words(speech):
    for name, wave in speech.waves.items():
        assert wave.dtype == torch.float32
        assert float(wave.abs().max()) <= 1
        for tier in (speech.phones[name], speech.words[name]):
            onsets, offsets, _ = zip(*tier, strict=True)
            assert (onsets[0], offsets[-1]) == (0, len(wave))
            assert onsets[1:] == offsets[:-1]
            assert all(time % 40 == 0 for time in onsets)  # whole control frames of 5 ms
        for onset, offset, word in speech.words[name]:
            inside = [p for p in speech.phones[name] if onset <= p[0] < offset]
            assert "".join(p for _, _, p in inside) == word


def test_words_are_said_equally_often_and_phones_share_contexts(speech):
    said = [word for tier in speech.words.values() for *_, word in tier if word != PAUSE]
    assert {said.count(word) for word in WORDS} == {16}
    assert {p for word in WORDS for p in word} == set(PHONES) - {PAUSE}
    items = speech.phone_items()
    contexts = {}
    for phone, prev, following in zip(items.phone, items.prev, items.next, strict=True):
        contexts.setdefault((prev, following), set()).add(phone)
    assert max(len(phones) for phones in contexts.values()) >= 3


def test_the_sound_is_where_the_alignment_says(speech):
    levels = {phone: [] for phone in PHONES}
    for name, wave in speech.waves.items():
        for onset, offset, phone in speech.phones[name]:
            levels[phone].append(float(wave[onset + 120 : offset - 120].std()))
    quiet = np.median(levels[PAUSE])
    assert all(np.median(levels[p]) > 3 * quiet for p in PHONES if p != PAUSE)
    # Fricatives are high, close vowels low; [a] opens what [i] closes.
    assert level(speech, "s", 1500, 4000) > 0.9
    assert level(speech, "u", 0, 1500) > 0.9
    assert level(speech, "a", 500, 1700) > 2 * level(speech, "i", 500, 1700)


def test_voices_differ_in_pitch(speech):
    pitches = []
    for voice in sorted(set(speech.voices.values())):
        found = []
        for name, wave in speech.waves.items():
            for onset, offset, phone in speech.phones[name]:
                if speech.voices[name] == voice and phone == "a":
                    part = wave[onset:offset].double()
                    power = torch.fft.rfft(part, 4096).abs().square()
                    echo = torch.fft.irfft(power)[20:130]
                    found.append(8000 / (20 + int(echo.argmax())))
        pitches.append(np.median(found))
    assert max(pitches) > 1.2 * min(pitches)


def test_mfcc_tell_its_phones_apart_neither_perfectly_nor_by_chance(speech):
    features = {name: mfcc(wave, 8000) for name, wave in speech.waves.items()}
    items = speech.phone_items()
    within = run(features, items, frame_rate=100, speaker="within").error
    across = run(features, items, frame_rate=100, speaker="across").error
    assert 0.01 < within < 0.12
    assert within + 0.02 < across < 0.35


def test_clips_hold_their_word_in_the_middle():
    speech = synthesise(3, voices=1, recordings=1, words=12, pause=350)
    clips, labels = speech.clips(5600)
    assert clips.shape == (12, 5600)
    assert sorted(labels.tolist()) == list(range(12))
    assert float(clips[:, :400].std()) < 0.2 * float(clips[:, 2400:3200].std())


def test_other_rates_have_other_samples_and_the_same_times():
    low, high = (synthesise(0, voices=1, recordings=1, sample_rate=r) for r in (8000, 16000))
    for name, tier in low.phones.items():
        assert [(2 * a, 2 * b, p) for a, b, p in tier] == high.phones[name]
        assert len(high.waves[name]) == 2 * len(low.waves[name])
