import dataclasses

import numpy as np
import pytest
import torch

from remanence.claims import wavaugment as module
from remanence.claims.wavaugment import ARMS, CLEAN, NOISY, OTHER_ROOM, RATIOS, ROOM, _claim
from remanence.kit.report import Report

TESTS = (CLEAN, NOISY, ROOM, OTHER_ROOM, *(f"{ratio:.0f} dB" for ratio in RATIOS))
FINE = module.Check("a figure", 1.0, 1.0, 0.1, "dB")


def measured(matching=0.2, wrong=0.4, checks=(FINE,), spread=0.02):
    rng = np.random.default_rng(0)
    errors = {}
    for arm in ARMS:
        for test in TESTS:
            mean = 0.4
            if arm == module.MATCHING.get(test):
                mean = matching
            elif arm == module.WRONG:
                mean = wrong
            errors[arm, test] = mean + spread * rng.standard_normal((4, 8))
    return module._Measured(checks, errors, (480, 288))


def test_the_verdict_asks_for_a_drop_an_interval_a_control_and_the_effects():
    assert _claim(measured()).holds
    assert not _claim(measured(matching=0.3)).holds  # a drop of 25 %
    assert not _claim(measured(wrong=0.2)).holds  # any augmentation would do
    assert not _claim(measured(spread=1.0)).holds  # seeds and voices differ by more
    assert not _claim(measured(checks=(FINE, FINE._replace(found=2.0)))).holds


def test_the_interval_is_over_seeds_and_their_voices():
    rng = np.random.default_rng(0)
    without = np.full((4, 50), 0.5)
    seeds = np.array([0.1, 0.2, 0.3, 0.4])[:, None] + 0.001 * rng.standard_normal((4, 50))
    drop, low, high = module._with_interval(lambda a, b: 1 - a / b, seeds, without)
    assert drop == pytest.approx(0.5, abs=0.01)
    # The mean of four draws from those four: 0.25 +- 2 * 0.112 / 2, halved by the error without.
    assert (low, high) == (pytest.approx(0.3, abs=0.05), pytest.approx(0.7, abs=0.05))


def test_the_effects_agree_with_theory():
    assert all(check.holds for check in module._checks())


def test_a_wrong_effect_is_seen(monkeypatch):
    right = module.add_noise
    monkeypatch.setattr(module, "add_noise", lambda x, n, snr: right(x, n, 2 * snr))
    assert [check.holds for check in module._checks()].count(False) == 3


def test_the_report_says_that_the_speech_is_synthetic():
    claim = _claim(measured())
    report = Report("x")
    claim.details(report)
    assert "<svg" in report.html()
    assert "ynthetic" in report.html()
    assert "synthetic speech" in claim.data


def test_training_is_reproducible_and_learns(monkeypatch):
    monkeypatch.setattr(module, "EPOCHS", 4)
    speech = module.synthesise(0, voices=2, recordings=4, words=12, pause=350)
    clips, labels = speech.clips(module.CLIP)
    features = module.log_mel(clips)
    assert features.shape[:2] == (96, 32)
    first, second = (module._trained([features], labels, 0) for _ in range(2))
    with torch.no_grad():
        assert torch.equal(first(features), second(features))
        assert float((first(features).argmax(1) == labels).float().mean()) > 0.3


def test_the_test_is_heard_in_other_noise_than_the_training():
    first, again, other = (module._noises(seed) for seed in (2, 2, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (8, 3 * module.RATE)


def test_claims_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _claim(measured()).holds = True
