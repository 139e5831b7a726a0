import copy
import dataclasses

import numpy as np
import pytest
import torch

from remanence.claims import cpc as module
from remanence.claims.cpc import MFCC, MODES, ROWS, TASKS, UNTRAINED, Bench, Scored, _claim
from remanence.claims.synthetic_speech import synthesise
from remanence.kit.audio import mfcc
from remanence.kit.report import Report
from remanence.speech.cpc.model import CPC


@pytest.fixture(scope="module")
def bench():
    return Bench(module._levelled(synthesise(1, voices=2, recordings=4, words=12)))


@pytest.fixture(scope="module")
def result(bench):
    return bench.score(lambda wave: mfcc(wave, 8000))


def measured(result, errors, half=0.03):
    """Errors by row, the same for all tasks, with intervals of +-half in every seed."""

    def scored(error, seed):
        error += 0.002 * seed
        row = dataclasses.replace(
            result.abx[TASKS[0]], error=error, interval=(error - half, error + half)
        )
        return Scored(dict.fromkeys(TASKS, row), 0.01)

    rows = {row: [scored(errors[row], seed) for seed in range(3)] for row in ROWS}
    return module._Measured(rows, (6, 1))


GOOD = {MFCC: 0.05, UNTRAINED: 0.4, **dict.fromkeys(MODES, 0.15)}


def test_the_verdict_asks_for_intervals_apart_and_a_large_drop_in_every_mode(result):
    assert _claim(measured(result, GOOD)).holds
    assert not _claim(measured(result, GOOD | {"past": 0.4})).holds  # it learned nothing
    assert not _claim(measured(result, GOOD | {"both": 0.3})).holds  # a drop of a quarter
    assert not _claim(measured(result, GOOD, half=0.15)).holds  # voices differ by more
    assert not _claim(measured(result, GOOD | {UNTRAINED: 0.15})).holds  # nothing to learn


def test_what_is_reported_follows_the_figures(result):
    assert "does not do better than MFCC" in _claim(measured(result, GOOD)).measured
    assert "does better than MFCC" in _claim(measured(result, GOOD | {"none": 0.03})).measured
    assert "made no certain difference" in _claim(measured(result, GOOD)).measured
    assert "Augmenting the past hurt" in _claim(measured(result, GOOD | {"past": 0.2})).measured
    assert "Augmenting the past helped" in _claim(measured(result, GOOD | {"past": 0.1})).measured


def test_the_report_shows_a_figure_and_says_that_the_speech_is_synthetic(result):
    claim = _claim(measured(result, GOOD))
    report = Report("x")
    claim.details(report)
    assert "<svg" in report.html()
    assert "synthetic speech" in report.html()
    assert "synthetic speech" in claim.data


def test_halves_of_a_voice_meet_each_other_and_no_other_voice(bench, result):
    cells = result.abx[TASKS[1]].cells  # across voices: what the halves must not mix
    assert len(cells.speakers) == 2
    found = module.run(
        {name: mfcc(wave, 8000) for name, wave in bench.speech.waves.items()},
        bench.halves,
        frame_rate=100,
        speaker="across",
    ).cells
    assert found.speakers == ("even", "odd")
    assert all(":" in str(context) for context in found.contexts)
    assert len(bench.shifted) == 4
    assert all(module._is_odd(name) for name in bench.shifted)


def test_shifting_x_costs_a_representation_of_pitch_and_nothing_else(bench):
    def constant(wave):
        return torch.ones(len(wave) // 80, 3)

    assert bench.score(constant).shifted == 0.0
    assert bench.score(constant).abx[TASKS[0]].error == 0.5


def test_training_is_reproducible_and_changes_the_network(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 3)
    speech = module._levelled(synthesise(0, voices=2, recordings=2, words=12))
    torch.manual_seed(0)
    untrained = CPC(**module.SIZES, sample_rate=8000)
    wave = next(iter(speech.waves.values()))
    features = {}
    for mode in MODES:
        for turn in range(2):
            model = copy.deepcopy(untrained)
            module.train(model, speech, mode, 0)
            assert not model.training
            features[mode, turn] = model.features(wave)
        assert torch.equal(features[mode, 0], features[mode, 1])
        assert not torch.equal(features[mode, 0], untrained.features(wave))
    assert not torch.equal(features["none", 0], features["past", 0])
    assert not torch.equal(features["past", 0], features["both", 0])


def test_a_network_that_does_not_learn_fails_the_claim(bench):
    torch.manual_seed(0)
    untrained = bench.score(CPC(**module.SIZES, sample_rate=8000).features)
    rows = {row: [untrained] * 2 for row in ROWS}
    claim = _claim(module._Measured(rows, (6, 1)))
    assert not claim.holds
    assert np.isfinite(untrained.abx[TASKS[1]].error)
