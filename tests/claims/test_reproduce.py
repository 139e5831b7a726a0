import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from remanence import cli
from remanence.claims import reproduce as module
from remanence.claims.claim import Claim
from remanence.claims.scenes import write_scenes
from remanence.kit.report import Report

HELD = Claim(
    system="held",
    paper="A paper (0000.00000)",
    sentence="Something holds.",
    measured="It is so: +3.0 points.",
    control="The control: +0.1 points.",
    holds=True,
    data="synthetic images",
    details=lambda report: report.text("The details of it."),
)
BROKEN = dataclasses.replace(HELD, system="broken", measured="It is not so <b>.", holds=False)


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.setattr(module, "CLAIMS", {n: f"{__name__}:{n}" for n in ("held", "broken")})


def held():
    return HELD


def broken():
    return BROKEN


@pytest.mark.usefixtures("claims")
def test_claims_that_hold_exit_with_0(tmp_path):
    assert cli.main(["reproduce", "held", "--out", str(tmp_path / "r")]) == 0
    html = (tmp_path / "r" / "report.html").read_text()
    for text in (HELD.paper, HELD.sentence, HELD.measured, HELD.control, "The details of it."):
        assert text in html
    assert json.loads((tmp_path / "r" / "results.json").read_text())["held"]["holds"] is True


@pytest.mark.usefixtures("claims")
def test_a_claim_that_does_not_hold_is_shown_and_exits_with_1(tmp_path):
    assert cli.main(["reproduce", "--out", str(tmp_path / "r")]) == 1
    html = (tmp_path / "r" / "report.html").read_text()
    assert "does not hold" in html
    assert "1 of 2 claims hold" in html
    assert "It is not so &lt;b&gt;." in html


@pytest.mark.usefixtures("claims")
def test_claims_measured_side_by_side_are_those_measured_in_turn(tmp_path, monkeypatch):
    figures = []
    for threads in (1, 2):
        monkeypatch.setattr(module.torch, "get_num_threads", lambda threads=threads: threads)
        out = tmp_path / str(threads)
        assert cli.main(["reproduce", "broken", "held", "--out", str(out)]) == 1
        results = json.loads((out / "results.json").read_text())
        assert list(results) == ["broken", "held"]
        figures.append({name: {**row, "seconds": 0} for name, row in results.items()})
        assert (out / "report.html").read_text().count("The details of it.") == 2
    assert figures[0] == figures[1]


@pytest.mark.usefixtures("claims")
def test_an_unknown_system_is_refused(tmp_path, capsys):
    assert cli.main(["reproduce", "nothing", "--out", str(tmp_path / "r")]) == 2
    assert "held, broken" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("claims")
def test_the_report_takes_the_next_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [cli.main(["reproduce", "held"]) for _ in range(2)] == [0, 0]
    assert (tmp_path / "remanence-report" / "report.html").exists()
    assert (tmp_path / "remanence-report-2" / "report.html").exists()


def test_every_claim_in_the_menu_can_be_imported():
    from importlib import import_module

    for target in module.CLAIMS.values():
        name, _, function = target.partition(":")
        assert callable(getattr(import_module(name), function))


def test_the_verdict_asks_for_more_than_an_average():
    from remanence.claims.fixres import _claim, _Measured

    rng = np.random.default_rng(0)
    hard = rng.random(600)

    def right(share):
        return (hard < share).astype(float)

    def measured(base, same, larger, bare):
        shares = {("none", s): 0.3 for s in (8, 12, 16, 20, 24, 28, 32)}
        shares |= {("none", 16): base, ("none", 20): bare}
        shares |= {("s", 16): same, ("s", 20): larger, ("s", 24): 0.3}
        arrays = {key: right(share) for key, share in shares.items()}
        return _Measured(21.0, 20, arrays, dict.fromkeys(arrays, 0.1))

    words = {"system": "x", "paper": "x", "sentence": "x"}
    assert _claim(measured(0.6, 0.62, 0.7, 0.66), "s", **words).holds
    # The control: the gain is that of tuning, not of the size.
    assert not _claim(measured(0.6, 0.70, 0.7, 0.66), "s", **words).holds
    assert not _claim(measured(0.6, 0.60, 0.6, 0.66), "s", **words).holds
    # Best without adaptation at the train size.
    assert not _claim(measured(0.6, 0.62, 0.7, 0.55), "s", **words).holds
    claim = _claim(measured(0.6, 0.62, 0.7, 0.66), "s", **words)
    report = Report("x")
    claim.details(report)
    assert "<svg" in report.html()


def test_scenes_are_reproducible_and_share_no_digit(tmp_path):
    write_scenes(tmp_path / "a")
    write_scenes(tmp_path / "b")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 1797
    assert len({p.stem for p in files}) == 1797
    for path in files[::200]:
        pair = [np.asarray(Image.open(tmp_path / d / path)) for d in "ab"]
        assert pair[0].shape == (40, 40)
        assert np.array_equal(*pair)
    counts = {s: sum(p.parts[0] == s for p in files) for s in ("train", "validation", "test")}
    assert counts == {"train": 900, "validation": 300, "test": 597}
