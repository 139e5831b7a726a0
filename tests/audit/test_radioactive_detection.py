"""The test keeps its word on innocent models, and finds marks where they were planted."""

import dataclasses
import math
import time
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn

from remanence.audit.radioactive.alignment import AlignmentSums, solve_alignment
from remanence.audit.radioactive.calibration import calibrate, uniform_carriers
from remanence.audit.radioactive.carriers import SecretKey, carriers, recipient_carriers
from remanence.audit.radioactive.detection import (
    detect,
    detect_logits,
    detect_recipients,
    detect_whitebox,
)
from remanence.audit.radioactive.head import Provenance, match_classes, prepare_head
from remanence.errors import InputError

K, D = 10, 64
KEYS = [SecretKey(bytes([i]) * 32) for i in range(6)]


# Real networks, trained without any mark


def train(images, labels, width, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.tensor(data.data / 16, dtype=torch.float32)
    labels = torch.tensor(data.target)
    marker = train(images[:700], labels[:700], D, 0)
    suspect = train(images[:700], labels[:700], 96, 1)
    other = train(images[:700], labels[:700], 48, 2)
    held_out = images[700:]
    phi0 = marker[:2](held_out).double()
    return {
        "marker": marker,
        "suspect": suspect,
        "labels": labels[700:],
        "phi0": phi0,
        "by_features": AlignmentSums.of(phi0, suspect[:2](held_out)),
        "logits": suspect(held_out).double(),
        "reference": solve_alignment(AlignmentSums.of(phi0, other(held_out))).head,
    }


def innocent_heads(digits):
    weight = digits["suspect"][2].weight
    aligned = solve_alignment(digits["by_features"])
    head = aligned.align(weight)
    log_probs = solve_alignment(
        AlignmentSums.of(digits["phi0"], digits["logits"].log_softmax(1))
    ).head
    return {
        "arbitrary": prepare_head(torch.randn(K, D, generator=torch.Generator().manual_seed(3))),
        "marker's own": prepare_head(digits["marker"][2].weight),
        "aligned": prepare_head(head, alignment=aligned),
        "aligned without intercept": prepare_head(
            solve_alignment(digits["by_features"], intercept=False).align(weight)
        ),
        "log-probabilities": prepare_head(log_probs, center=True),
        "reference projected out": prepare_head(head, reference=[digits["reference"]]),
        "six classes": prepare_head(head, class_map=[0, 1, -1, 9, -1, 3, 3, -1, -1, 2]),
    }


def test_p_values_are_uniform_on_every_innocent_head(digits):
    for name, head in innocent_heads(digits).items():
        outcome = calibrate(head, draws=2000)
        assert outcome.ks_p > 0.01, name
        assert outcome.check.holds is True
        assert outcome.rejection_rates[0.05] == pytest.approx(0.05, abs=0.02), name


def all_positive(generator, num_classes, dim):
    return generator.random((num_classes, dim))


def one_for_all(generator, num_classes, dim):
    return np.repeat(uniform_carriers(generator, 1, dim), num_classes, axis=0)


@pytest.mark.parametrize("wrong", [all_positive, one_for_all])
def test_wrongly_drawn_carriers_are_caught_on_a_real_head(digits, wrong):
    head = innocent_heads(digits)["aligned"]
    outcome = calibrate(head, draws=2000, sampler=wrong)
    assert outcome.ks_p < 1e-6
    assert outcome.check.holds is False


def test_derived_carriers_are_calibrated_too(digits):
    head = innocent_heads(digits)["aligned"]
    key = KEYS[0]
    log_p = [detect(head, carriers(key, K, D, decoy=b)).log10_p for b in range(200)]
    assert stats.kstest(10 ** np.array(log_p), "uniform").pvalue > 0.01


# Planted marks in feature space (positive controls)


def features(seed, n=2000):
    """Gaussian classes, the same for every seed, with unequal spread along the axes."""
    generator = torch.Generator().manual_seed(seed)
    law = torch.Generator().manual_seed(99)
    means = torch.randn(K, D, generator=law, dtype=torch.float64) / 4
    spread = torch.linspace(0.5, 1.5, D, dtype=torch.float64)
    labels = torch.arange(n) % K
    noise = torch.randn(n, D, generator=generator, dtype=torch.float64) * spread
    return means[labels] + noise, labels


def mark(phi, labels, u, alpha, q):
    """Move the first share q of every class by alpha along its carrier."""
    chosen = (torch.arange(len(labels)) // K < q * len(labels) / K).double()
    return phi + alpha * chosen[:, None] * torch.from_numpy(u)[labels]


def ridge_head(phi, labels):
    targets = nn.functional.one_hot(labels, K).double()
    return solve_alignment(AlignmentSums.of(phi, targets), ridge=1e-3).head


def mean_over_carriers(alpha, q, reference=()):
    phi, labels = features(0)
    found = []
    for key in KEYS[:5]:
        u = carriers(key, K, D)
        head = ridge_head(mark(phi, labels, u, alpha, q), labels)
        found.append(detect_whitebox(head, None, u, reference=reference))
    return np.mean([f.mean_cosine for f in found]), np.median([f.log10_p for f in found])


def test_the_cosine_grows_with_the_mark_and_with_the_marked_share():
    by_strength = [mean_over_carriers(alpha, 0.2) for alpha in (0, 0.5, 1, 2, 4)]
    by_share = [mean_over_carriers(2.0, q) for q in (0, 0.05, 0.1, 0.2, 0.5, 1)]
    for found in (by_strength, by_share):
        cosines, log10_p = zip(*found, strict=True)
        assert np.all(np.diff(cosines) > 0.005)
        assert abs(cosines[0]) < 4 / math.sqrt(5 * K * D)
        assert log10_p[0] > -2
        assert log10_p[-1] < -6


def test_clean_heads_of_fresh_data_give_uniform_p_values():
    heads = [ridge_head(*features(seed, 400)) for seed in range(20)]
    p = [
        10 ** detect_whitebox(head, None, carriers(KEYS[0], K, D, decoy=10 * i + j)).log10_p
        for i, head in enumerate(heads)
        for j in range(10)
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_reference_heads_of_clean_data_make_the_mark_far_more_visible():
    reference = [ridge_head(*features(1)), ridge_head(*features(2))]
    plain = mean_over_carriers(2.0, 0.1)
    projected = mean_over_carriers(2.0, 0.1, reference)
    assert projected[1] < plain[1] - 3


def test_projection_equals_the_test_in_the_complement_and_forgets_the_references():
    generator = torch.Generator().manual_seed(5)
    head = torch.randn(K, D, generator=generator, dtype=torch.float64)
    reference = torch.randn(12, D, generator=generator, dtype=torch.float64)
    reference[11] = reference[0] - reference[1]  # rank 11
    u = carriers(KEYS[0], K, D)
    found = detect_whitebox(head, None, u, reference=[reference[:5], 1e6 * reference[5:]])
    rotation = np.linalg.qr(reference[:11].T.numpy(), mode="complete")[0][:, 11:]
    by_hand = detect_whitebox(head @ torch.from_numpy(rotation), None, u @ rotation)
    assert found.d_eff == by_hand.d_eff == D - 11
    np.testing.assert_allclose(found.cosines, by_hand.cosines, atol=1e-12)
    leaning = head + torch.randn(K, 12, generator=generator).double() @ reference
    same = detect_whitebox(leaning, None, u, reference=[reference])
    np.testing.assert_allclose(found.cosines, same.cosines, atol=1e-10)


# What each access level gives


def test_logits_give_the_white_box_answer_whatever_their_temperature(digits):
    u = carriers(KEYS[0], K, D)
    aligned = solve_alignment(digits["by_features"])
    white = detect_whitebox(digits["suspect"][2].weight, aligned, u)
    centred = detect_whitebox(digits["suspect"][2].weight, aligned, u, center=True)
    shift = torch.randn(len(digits["phi0"]), 1, generator=torch.Generator().manual_seed(0)) * 9

    def by_logits(outputs, center="auto"):
        sums = AlignmentSums.of(digits["phi0"], outputs)
        return detect_logits(solve_alignment(sums), u, center=center)

    # The suspect ran in float32: its logits are W phi + b only to about 1e-6.
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    close(by_logits(digits["logits"]).cosines, white.cosines)
    close(by_logits(digits["logits"] / 7).cosines, white.cosines)
    close(by_logits(digits["logits"].log_softmax(1)).cosines, centred.cosines)
    close(by_logits((digits["logits"]) + shift, center=True).cosines, centred.cosines)
    assert np.abs(white.cosines - centred.cosines).max() > 1e-3


def test_a_suspect_in_rotated_features_is_found_as_if_it_were_not_rotated():
    u = carriers(KEYS[0], K, D)
    phi, labels = features(0)
    head = ridge_head(mark(phi, labels, u, 2.0, 0.5), labels)
    rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0])
    aligned = solve_alignment(AlignmentSums.of(phi, phi @ rotation))
    turned = detect_whitebox(head @ rotation, aligned, u)
    straight = detect_whitebox(head, None, u)
    np.testing.assert_allclose(turned.cosines, straight.cosines, atol=1e-8)
    assert straight.evidence.verdict == turned.evidence.verdict == "detected"
    # Without alignment the rotated head says nothing.
    assert detect_whitebox(head @ rotation, None, u).log10_p > -3


def test_permuted_and_missing_classes_are_matched_without_the_carriers(digits):
    order = torch.tensor([3, 7, 1, 0, 9, 8, 2, 6, 4])  # class 5 is missing
    found = match_classes(digits["logits"][:, order], digits["labels"], K)
    expected = [order.tolist().index(k) if k != 5 else -1 for k in range(K)]
    assert found.tolist() == expected
    u = carriers(KEYS[0], K, D)
    whole = solve_alignment(AlignmentSums.of(digits["phi0"], digits["logits"]))
    part = solve_alignment(AlignmentSums.of(digits["phi0"], digits["logits"][:, order]))
    mapped = detect_logits(part, u, class_map=found)
    assert mapped.classes.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    np.testing.assert_allclose(
        mapped.cosines, np.delete(detect_logits(whole, u).cosines, 5), atol=1e-10
    )


def test_the_null_has_the_carriers_dimension_and_one_side():
    generator = torch.Generator().manual_seed(0)
    phi0 = torch.randn(400, D, generator=generator)
    aligned = solve_alignment(AlignmentSums.of(phi0, torch.randn(400, 200, generator=generator)))
    found = detect_whitebox(torch.randn(K, 200, generator=generator), aligned, np.eye(K, D))
    assert found.d_eff == D
    u = carriers(KEYS[0], K, D)
    head = torch.from_numpy(u)
    assert detect_whitebox(head, None, u).log10_p < -1000
    assert math.isfinite(detect_whitebox(head, None, u).log10_p)
    assert detect_whitebox(-head, None, u).log10_p == 0


# What the evidence says


def test_alignment_on_marked_images_accuses_an_innocent_model():
    u = carriers(KEYS[0], K, D)
    phi, labels = features(0)
    # A good suspect knows the classes beyond the marker's features, and does not react to marks;
    # the marker does, so the regression finds the label in the carriers.
    noise = torch.randn(len(labels), K, generator=torch.Generator().manual_seed(1)).double()
    answers = 5 * nn.functional.one_hot(labels, K) + noise
    marked = mark(phi, labels, u, 1.0, 1.0)
    told = Provenance(committed=True, images_unmarked=False)
    found = detect_logits(solve_alignment(AlignmentSums.of(marked, answers)), u, provenance=told)
    assert found.log10_p < -10
    assert found.evidence.verdict == "not interpretable"
    assert "lean even an innocent model" in found.evidence.answer
    clean = detect_logits(solve_alignment(AlignmentSums.of(phi, answers)), u)
    assert clean.log10_p > -3


def test_a_broken_commitment_fails_and_none_leaves_it_open():
    head, u = torch.randn(K, D), carriers(KEYS[0], K, D)
    for committed in (True, False, None):
        found = detect_whitebox(head, None, u, provenance=Provenance(committed=committed))
        assert found.evidence.checks[0].holds is committed
        assert (found.evidence.verdict == "not interpretable") == (committed is False)
    published = KEYS[0].commitment(b"manifest")
    held = KEYS[1].verify(published, b"manifest")
    refused = detect_whitebox(head, None, u, provenance=Provenance(committed=held))
    assert refused.evidence.failed


def test_the_evidence_says_what_would_change_it():
    u = carriers(KEYS[0], K, D)
    noise = torch.randn(K, D, generator=torch.Generator().manual_seed(1)).double() / math.sqrt(D)
    weak = detect_whitebox(torch.from_numpy(0.03 * u) + noise, None, u)
    strong = detect_whitebox(torch.from_numpy(u) + noise, None, u)
    away = detect_whitebox(torch.from_numpy(-u) + noise, None, u)
    assert strong.evidence.verdict == "detected"
    assert strong.evidence.would_change.startswith("Below a mean cosine of about 0.065")
    assert "leans away" in away.evidence.would_change
    assert weak.evidence.verdict == "not detected"
    assert "would be detected" in weak.evidence.would_change
    estimate = strong.evidence.estimates[0]
    assert estimate.low < strong.mean_cosine == estimate.value < estimate.high
    assert strong.evidence.value == pytest.approx(-2 * strong.log_p.sum())
    assert strong.stouffer_log10_p < -5
    with pytest.raises(dataclasses.FrozenInstanceError):
        strong.d_eff = 3  # type: ignore[misc]


# Recipients


def test_the_leaking_recipient_is_found_among_many():
    names = ["Ada", "Bo", "Cy", "Di", "Ed"]
    sets = recipient_carriers(dict(zip(names, KEYS, strict=False)), K, D)
    phi, labels = features(0)
    head = ridge_head(mark(phi, labels, sets["Cy"], 2.0, 0.5), labels)
    outcome = detect_recipients(lambda u: detect_whitebox(head, None, u), sets)
    assert outcome.found == ("Cy",)
    cy = outcome.detections["Cy"]
    assert cy.evidence.corrected_log10_p == pytest.approx(cy.log10_p + math.log10(5))
    assert outcome.evidence is cy.evidence
    assert "Cy's copy" in outcome.evidence.question
    sets["Bo"] = sets["Cy"].copy()
    with pytest.raises(InputError, match="Bo and Cy have the same carriers"):
        detect_recipients(lambda u: detect_whitebox(head, None, u), sets)


def test_innocent_recipients_are_rarely_named():
    rng = np.random.default_rng(0)
    head = prepare_head(ridge_head(*features(0)))
    false_alarms = 0
    for _ in range(60):
        sets = {str(i): uniform_carriers(rng, K, D) for i in range(20)}
        false_alarms += bool(detect_recipients(partial(detect, head), sets).found)
    assert false_alarms <= 9  # 3 expected; uncorrected it would be 38


# Speed and bad input


def test_a_thousand_classes_in_2048_dimensions_take_less_than_50_ms():
    rng = np.random.default_rng(0)
    head = torch.from_numpy(rng.standard_normal((1000, 2048)))
    u = rng.standard_normal((1000, 2048))
    prepared = prepare_head(head)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        detect(prepared, u)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda h, u: detect_whitebox(h, None, u[:, :32]), r"carriers \(10, 32\) do not fit"),
        (lambda h, u: detect_whitebox(h, None, u[:4]), "class_map"),
        (lambda h, u: detect_whitebox(h, None, u, class_map=[10] * 10), "outside the suspect's 10"),
        (lambda h, u: detect_whitebox(h, None, u, class_map=[-1] * 10), "leaves no class"),
        (lambda h, u: detect_whitebox(h / 0, None, u), "finite"),
        (lambda h, u: detect_whitebox(h * (torch.arange(10) != 4)[:, None], None, u), "class 4"),
        (lambda h, u: detect_whitebox(h, None, u, reference=[h * 2]), "out of the references"),
        (lambda h, u: detect_whitebox(h, None, u, reference=[h[:, :9]]), "align it"),
        (
            lambda h, u: detect_whitebox(h, None, u, reference=[torch.randn(33, D)]),
            "span 33 of 64 dimensions: give fewer, up to 32",
        ),
        (lambda h, _: calibrate(prepare_head(h), draws=5), "at least 20"),
        (lambda h, _: match_classes(h, torch.zeros(3), K), "do not match"),
        (lambda h, _: match_classes(h, torch.full((10,), 10), K), r"outside 0\.\.9"),
        (
            lambda h, _: detect_recipients(lambda v: detect_whitebox(h, None, v), {}),
            "no recipients",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    head = torch.randn(K, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(InputError, match=words):
        call(head, carriers(KEYS[0], K, D))
