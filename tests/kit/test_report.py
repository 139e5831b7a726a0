"""The report page: escaping, self-containment, numbers, figures."""

import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from remanence.kit.report import Cell, Report, curve_figure

TIMES, MINUS, DASH = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}", "\N{EN DASH}"
EVIL = "<script>alert('x')</script>\"'&"
VOID = {"meta", "link", "br", "img", "hr"}


class Page(HTMLParser):
    """Tags, attributes, ids and text of a page; fails on tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]


def drawn(title: str = "a title") -> Figure:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2, 3], [2, 1, 3], "o-", label="a")
    axes.imshow(np.eye(3), extent=(1, 3, 1, 3))
    axes.set_title(title)
    axes.legend()
    return figure


def full_report(text: str = "plain") -> Report:
    report = Report(text, subtitle=text)
    report.facts({text: text, "seed": 0, "lr": 1e-3, "options": {text: text}, "device": None})
    for k in range(4):
        report.section(f"{text} {k}")
        report.text(text)
        report.verdict([True, False, None, True][k], text)
        report.table([text, "n"], [[text, 1], [Cell(text, mark="best"), None]], caption=text)
        report.figure(drawn(text), caption=text, alt=text)
    return report


def columns(rows: list[list[object]]) -> list[list[str]]:
    report = Report("t")
    report.table(["c"] * len(rows[0]), rows)  # type: ignore[arg-type]  # any cell may be tried
    found = re.findall(r"<(t[dh])( scope=\"row\")?([^>]*)>(.*?)</\1>", report.html())
    cells = [cell for *_, cell in found][len(rows[0]) :]
    assert len(cells) == len(rows) * len(rows[0])
    return [cells[j :: len(rows[0])] for j in range(len(rows[0]))]


def column(*values: object) -> list[str]:
    return columns([[value] for value in values])[0]


# Safety


def test_every_field_is_escaped() -> None:
    html = full_report(EVIL).html()
    page = Page(html)
    assert "script" not in page.tags
    assert not re.search(r"<script", html, re.IGNORECASE)
    text = "".join(page.text)
    # Title (twice), subtitle, facts, TOC, headings, texts, cells, captions, figure titles.
    assert text.count(EVIL) >= 5 + 4 * 8
    assert page.values("aria-label").count(EVIL) >= 4


def test_no_external_request_and_no_script() -> None:
    html = full_report().html()
    page = Page(html)
    assert "script" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for value in page.values("src", "href", "xlink:href", "data", "action"):
        assert value.startswith(("#", "data:")), value
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html
    # Namespace names are no requests; nothing else may look like an address.
    assert re.sub(r'xmlns="http://www.w3.org/2000/svg"', "", html).count("http:") == 0
    assert "https:" not in html
    (policy,) = [v for v in page.values("content") if "default-src" in v]
    assert "default-src 'none'" in policy


# Figures


def test_svg_is_inline_and_bare() -> None:
    html = full_report().html()
    assert html.count("<svg") == 4
    assert html.lower().count("<!doctype") == 1
    for unwanted in ("<?xml", "<metadata", "<!--", "dc:date", "ns0:"):
        assert unwanted not in html
    assert html.count("<style") == 1  # matplotlib's own sheet would apply to the whole page
    assert "a title" in "".join(Page(_with_figures(drawn()).html()).text)  # text stays text


def _with_figures(*figures: Figure) -> Report:
    report = Report("t")
    for figure in figures:
        report.figure(figure, caption="c", alt="a")
    return report


def test_ids_are_unique_and_every_reference_resolves() -> None:
    page = Page(_with_figures(drawn(), drawn(), drawn("other")).html())
    ids = page.values("id")
    assert len(ids) > 30
    assert len(ids) == len(set(ids))
    references = [v[1:] for v in page.values("href", "xlink:href") if v.startswith("#")]
    for value in page.values("clip-path", "style", "fill", "filter", "mask"):
        references += re.findall(r"url\(#([^)]*)\)", value)
    assert len(references) > 10
    assert set(references) <= set(ids)


def test_equal_input_gives_equal_output() -> None:
    assert full_report().html() == full_report().html()
    report = full_report()
    assert report.html() == report.html()


def test_a_figure_scales_and_keeps_its_proportions() -> None:
    html = _with_figures(drawn()).html()
    svg = re.search(r"<svg[^>]*>", html)
    assert svg
    assert "viewBox" in svg[0]
    assert not re.search(r' (width|height)="', svg[0])
    assert "max-width" not in svg[0]  # it would beat the page's own, which fits it to a phone


def test_no_pyplot_and_no_global_settings() -> None:
    before = dict(mpl.rcParams)
    full_report().html()
    assert dict(mpl.rcParams) == before
    code = (
        "import sys; from remanence.kit.report import Report, curve_figure\n"
        "assert 'matplotlib' not in sys.modules\n"  # it takes a second
        "r = Report('t'); f = curve_figure({'a': ([1, 2], [1, 2], None, None)}, 'x', 'y')\n"
        "r.figure(f, caption='c', alt='a'); r.html(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Numbers


def test_numbers_of_a_column_share_their_decimals() -> None:
    assert column(79.34, 81.2, 64.0) == ["79.34", "81.20", "64.00"]
    assert column(0.5, 0.25, 1.0) == ["0.50", "0.25", "1.00"]
    assert column(2.302585, 0.0123456) == ["2.303", "0.012"]
    assert column(1 / 3) == ["0.3333"]
    assert column(3.0, 4.0) == ["3", "4"]
    assert column(-1.25, 0.0) == [f"{MINUS}1.25", "0.00"]
    assert column(-0.0) == ["0"]


def test_small_numbers_are_never_rounded_to_nothing() -> None:
    assert column(0.5, 0.03125, 1.23456e-8) == ["0.5000", "0.0312", f"1.235{TIMES}10⁻⁸"]
    assert column(1234.5, 3.25, 12.25) == ["1,234", "3.25", "12"]
    assert column(12_345_678.9) == [f"1.235{TIMES}10⁷"]
    assert column(-1e-300) == [f"{MINUS}1{TIMES}10⁻³⁰⁰"]


def test_other_cells() -> None:
    assert column(999, 1000, 1_281_167, -5) == [
        "999",
        "1,000",
        "1,281,167",
        f"{MINUS}5",
    ]
    assert column(None, "as it is 1000", True, False) == [DASH, "as it is 1000", "yes", "no"]
    assert column(float("nan"), float("inf"), -float("inf")) == ["NaN", "∞", f"{MINUS}∞"]
    assert column(np.float32(0.1), np.float64(0.25)) == ["0.10", "0.25"]
    assert column(np.int64(12_000), np.bool_(True)) == ["12,000", "yes"]


def test_marks_and_alignment() -> None:
    report = Report("t")
    report.table(["model", "top-1", "note"], [["a", Cell(79.3, mark="best"), "x"], ["b", None, ""]])
    html = report.html()
    assert re.search(r'<td class="number best">79.3</td>', html)
    assert re.search(r'<th scope="col" class="number">top-1</th>', html)
    assert re.search(r'<th scope="col">note</th>', html)
    assert '<th scope="row" class="short">b</th>' in html


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 cells"):
        Report("t").table(["a"], [["x", "y"]])


# Page


def test_contents_appear_beyond_three_sections() -> None:
    short = Report("t")
    for k in range(3):
        short.section(f"s{k}")
    assert "<nav" not in short.html()
    short.section("the fourth")
    page = Page(short.html())
    links = [v for v in page.values("href") if v.startswith("#")]
    assert len(links) == 4
    assert {v[1:] for v in links} <= set(page.values("id"))


@pytest.mark.parametrize(
    ("holds", "words"), [(True, "holds"), (False, "does not hold"), (None, "not decided")]
)
def test_verdicts(holds: bool | None, words: str) -> None:
    report = Report("t")
    report.verdict(holds, "Larger test images help.")
    assert re.search(rf">{words}</\w+> Larger test images help\.", report.html())


def test_facts_are_exact() -> None:
    report = Report("t")
    report.facts({"seed": 20240101, "lr": 0.000123456, "options": {"k": 3, "x": None}})
    html = report.html()
    assert "<dt>seed</dt><dd>20240101</dd>" in html
    assert "<dd>0.000123456</dd>" in html
    assert f"<dd>k=3, x={DASH}</dd>" in html


def test_write(tmp_path: Path) -> None:
    report = full_report("Überblick")
    report.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == report.html().encode()


def test_the_template_travels_with_the_package() -> None:
    assert (files("remanence.kit") / "report.html.jinja").is_file()


# Curves


def test_curves_have_bands_and_labels_that_do_not_overlap() -> None:
    x = np.arange(5)
    series = {f"model {k}": (x, 70 + x + k / 50, 69 + x, 71 + x) for k in range(6)}
    figure = curve_figure(series, "test resolution (px)", "top-1 (%)", vlines={"train": 2})
    (axes,) = figure.axes
    assert len(axes.collections) == 6
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("test resolution (px)", "top-1 (%)")
    assert len({line.get_color() for line in axes.get_lines()[:6]}) == 6
    figure.draw_without_rendering()
    # An annotation's own extent would include its leader line.
    labels = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    assert set(labels) == {*series, "train"}
    boxes = sorted((labels[name].y0, labels[name].y1) for name in series)
    assert all(upper[0] >= lower[1] - 1 for lower, upper in itertools.pairwise(boxes))


def test_curves_without_bands_and_with_gaps() -> None:
    figure = curve_figure({"a": ([1, 2, 3], [1.0, 2.0, float("nan")], None, None)}, "x", "y")
    (axes,) = figure.axes
    assert not axes.collections
    (label,) = axes.texts
    assert isinstance(label, Annotation)
    assert tuple(label.xy) == (2, 2.0)
    diverged = curve_figure({"a": ([1, 2], [float("nan")] * 2, None, None)}, "x", "y")
    assert not diverged.axes[0].texts


def test_an_included_report_keeps_its_sections_and_its_figures_ids():
    page = Report("page")
    page.section("first")
    for mark in ("a-", "b-"):
        part = Report("part", mark=mark)
        part.text(f"before {mark}")
        part.section(f"section {mark}")
        part.figure(curve_figure({"x": ([0, 1], [0, 1], None, None)}, "x", "y"), "caption", "alt")
        page.include(part)
    html = page.html()
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    places = [html.index(text) for text in ("before a-", "section a-", "before b-", "section b-")]
    assert places == sorted(places)
