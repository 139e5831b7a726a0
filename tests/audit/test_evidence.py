import json
import math

import pytest

from remanence.audit.evidence import Check, Estimate, Evidence
from remanence.jobs.audit.evidence_report import add_evidence, add_explored
from remanence.kit.report import Report


def evidence(log10_p: float, *checks: Check, corrected: float | None = None) -> Evidence:
    return Evidence(
        question="Was the set in training?",
        statistic="D+",
        value=0.25,
        null="Both sets are drawn from one distribution.",
        log10_p=log10_p,
        method="exact",
        would_change="More images.",
        estimates=(Estimate("leaked fraction", 0.2, 0.1, 0.3),),
        checks=checks,
        corrected_log10_p=corrected,
    )


@pytest.mark.parametrize(
    ("log10_p", "verdict"),
    [(-400.0, "detected"), (math.log10(0.05), "detected"), (-1.3, "not detected")],
)
def test_the_verdict_follows_the_level(log10_p, verdict):
    assert evidence(log10_p).verdict == verdict


def test_a_failed_check_outweighs_any_p_value():
    failed = Check("The sets have one source.", False, "AUC 0.93 on pixels alone")
    unknown = Check("The reference was not used for selection.", None, "not known")
    found = evidence(-300.0, unknown, failed)
    assert found.verdict == "not interpretable"
    assert "AUC 0.93" in found.answer
    assert evidence(-300.0, unknown).verdict == "detected"


def test_an_undefined_p_value_decides_nothing():
    assert evidence(math.nan).verdict == "not interpretable"


def test_the_corrected_p_value_decides():
    assert evidence(-2.0, corrected=-0.5).verdict == "not detected"


def test_tiny_p_values_stay_readable():
    assert evidence(-412.3).p_text == "= 10^-412.3"
    assert evidence(-1.5).p_text == "= 0.032"
    assert evidence(-412.3).p == 0.0


def test_json_and_html_say_the_same():
    found = evidence(-3.0, Check("One source <b>.", True, "AUC 0.51"))
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["verdict"] == "detected"
    assert plain["checks"][0]["holds"] is True
    report = Report("audit")
    add_evidence(report, found)
    add_explored(report, [evidence(-5.0)])
    page = report.html()
    for words in ("detected", "Was the set in training?", "leaked fraction", "Exploratory"):
        assert words in page
    assert "One source &lt;b&gt;." in page
