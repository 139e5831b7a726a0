"""One self-contained HTML file that shows what a run found."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Self
from xml.etree import ElementTree as ET

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

Value = str | int | float | None
_DASH = "\N{EN DASH}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# The colours of Okabe and Ito (2008), told apart with any colour vision; no yellow on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv<>"


@dataclass(frozen=True)
class Cell:
    """A table cell with a mark.

    Attributes:
        value: What a plain cell would hold.
        mark: "best" or "bad" to set it off from the others, or None.
    """

    value: Value
    mark: Literal["best", "bad"] | None = None


@dataclass
class _Section:
    heading: str
    blocks: list[dict[str, Any]] = field(default_factory=list)


class Report:
    """Collects text, tables, figures and verdicts, in order, into one HTML page.

    The page needs no network and runs no script, follows the reader's light or dark setting,
    and reads on a phone, on a desk and on paper. Everything given is escaped. Equal input gives
    the same bytes.

    Args:
        title: Heading of the page.
        subtitle: One line under it.
        mark: Begins the ids of its figures; reports that one page includes need different ones.
    """

    def __init__(self, title: str, subtitle: str = "", mark: str = "") -> None:
        self._title = title
        self._subtitle = subtitle
        self._mark = mark
        self._sections = [_Section("")]  # what comes before the first heading
        self._figures = 0

    def section(self, heading: str) -> None:
        """Begin a section; beyond three of them, the page opens with a table of contents."""
        self._sections.append(_Section(heading))

    def text(self, paragraph: str) -> None:
        """Add a paragraph of plain text."""
        self._add("text", text=paragraph)

    def verdict(self, holds: bool | None, sentence: str, words: str | None = None) -> None:
        """Say whether a claim holds; None means that the run could not decide it.

        Args:
            holds: What the run decided.
            sentence: The finding in one sentence.
            words: What the mark says in place of holds, does not hold and not decided.
        """
        usual = {True: "holds", False: "does not hold", None: "not decided"}[holds]
        css = usual.replace(" ", "-")
        self._add("verdict", css=css, words=words or usual, sentence=sentence)

    def facts(self, mapping: Mapping[str, object]) -> None:
        """Add a small list of names and exact values: command, options, versions, seed, device."""
        self._add("facts", items=[(name, _exact(value)) for name, value in mapping.items()])

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[Value | Cell]], caption: str = ""
    ) -> None:
        """Add a table.

        Floats of a column share their decimals, chosen so that the largest shows four significant
        digits; a float too small for that shows four of its own. Integers are grouped in
        thousands by commas, as in sentences, None is an en dash, strings stay as they are.

        Args:
            header: Column names.
            rows: One sequence of cells per row; the first cell names the row.
            caption: One line over the table.

        Raises:
            ValueError: If a row has another length than the header.
        """
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"a row of {len(row)} cells under a header of {len(header)}")
        cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
        columns = [[row[j].value for row in cells] for j in range(len(header))]
        texts = [_column_texts(column) for column in columns]
        numeric = [_is_numeric(column) for column in columns]
        self._add(
            "table",
            caption=caption,
            header=list(zip(header, numeric, strict=True)),
            rows=[
                [(texts[j][i], numeric[j], cell.mark) for j, cell in enumerate(row)]
                for i, row in enumerate(cells)
            ],
        )

    def figure(self, figure: Figure, caption: str, alt: str) -> None:
        """Add a matplotlib figure, drawn now, as inline SVG.

        Args:
            figure: The figure; later changes to it do not show.
            caption: One or two sentences under it.
            alt: What it shows, for those who cannot see it.
        """
        self._figures += 1
        self._add(
            "figure", svg=_svg(figure, f"{self._mark}fig{self._figures}-", alt), caption=caption
        )

    def include(self, other: Self) -> None:
        """Add all that another report holds, from where this one stands."""
        first, *rest = other._sections
        self._sections[-1].blocks += first.blocks
        self._sections += rest

    def html(self) -> str:
        """The page as one string."""
        environment = Environment(
            loader=PackageLoader("remanence.kit", ""),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("report.html.jinja").render(
            title=self._title, subtitle=self._subtitle, sections=self._sections
        )

    def write(self, path: Path) -> None:
        """Write the page to `path`, in UTF-8."""
        path.write_text(self.html(), encoding="utf-8", newline="\n")

    def _add(self, kind: str, **block: object) -> None:
        self._sections[-1].blocks.append({"kind": kind, **block})


def curve_figure(
    series: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike | None, ArrayLike | None]],
    xlabel: str,
    ylabel: str,
    vlines: Mapping[str, float] | None = None,
) -> Figure:
    """Curves with confidence bands, each labelled at its end.

    Args:
        series: Name to `(x, y, low, high)`, each (N,); low and high may be None.
        xlabel: Name and unit of x.
        ylabel: Name and unit of y.
        vlines: Name to x of vertical reference lines.

    Returns:
        A figure that belongs to no window and no global state.
    """
    from matplotlib.figure import Figure  # takes a second, and some runs draw nothing

    figure = Figure(figsize=(5, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    ends = []
    for i, (name, (x, y, low, high)) in enumerate(series.items()):
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.6)
        if low is not None and high is not None:
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        ends += [
            (ys[last], xs[last], name, colour) for last in np.flatnonzero(np.isfinite(ys))[-1:]
        ]
    for i, (name, at) in enumerate((vlines or {}).items()):
        axes.axvline(at, color="#888888", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        # Neighbouring names stand on two levels.
        axes.annotate(
            name,
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3 + 11 * (i % 2)),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    # Labels stand beside their curve's end, pushed apart by at least a line's height.
    ends.sort()
    bottom, top = axes.get_ylim()
    heights = [(y - bottom) / (top - bottom) for y, *_ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + 0.07)
    for i in range(len(heights) - 1, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - 0.07 if i + 1 < len(heights) else 1.0)
    for (y, x, name, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0, 0.5)},
        )
    return figure


def _svg(figure: Figure, prefix: str, alt: str) -> Markup:
    """Draw a figure as an `<svg>` element fit for a page that holds others."""
    import matplotlib as mpl

    buffer = io.StringIO()
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "remanence",
        "svg.image_inline": True,
    }
    with mpl.rc_context(settings):
        figure.savefig(
            buffer, format="svg", bbox_inches="tight", pad_inches=0.08, metadata={"Date": None}
        )
    root = ET.fromstring(buffer.getvalue())  # noqa: S314  # matplotlib wrote it a line ago
    for parent in root.iter():
        for child in list(parent):
            # The sheet's "*" rule would style the whole page: the root's style replaces it.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        # HTML knows <svg> and href without their namespaces, and would not know <ns0:svg>.
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            bare = name.rpartition("}")[2]
            if bare == "id":
                element.set(bare, prefix + value)
            elif bare == "href" and value.startswith("#"):
                element.set(bare, f"#{prefix}{value[1:]}")
            else:
                element.set(bare, value.replace("url(#", f"url(#{prefix}"))
    width = float(root.attrib["viewBox"].split()[2])
    root.attrib.pop("width")
    root.attrib.pop("height")
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("role", "img")
    root.set("aria-label", alt)
    # Points to pixels, and up to a fifth larger where there is room.
    size = f"width: {width * 4 / 3 * 1.2:.0f}px"
    root.set("style", f"{size}; stroke-linejoin: round; stroke-linecap: butt")
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704  # ElementTree escapes


def _exact(value: object) -> str:
    """A fact is copied and searched for, so nothing is rounded or grouped."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_exact(item)}" for name, item in value.items())
    return _DASH if value is None else str(value)


def _is_numeric(column: Sequence[Value]) -> bool:
    given = [value for value in column if value is not None]
    return bool(given) and all(isinstance(v, Real) and not isinstance(v, bool) for v in given)


def _column_texts(column: Sequence[Value]) -> list[str]:
    """Format the values of a column so that their decimal points line up."""
    sizes = [abs(float(v)) for v in column if isinstance(v, float | np.floating)]
    fixed = [size for size in sizes if 1e-4 <= size < 1e6]
    wanted = max((_decimals(size) for size in fixed), default=0)
    largest = max(fixed, default=1.0)
    decimals = min(wanted, max(0, 3 - math.floor(math.log10(largest))))
    return [_number(v, decimals) if isinstance(v, Real) else _word(v) for v in column]


def _word(value: object) -> str:
    if value is None:
        return _DASH
    return ("yes" if value else "no") if isinstance(value, np.bool_) else str(value)


def _decimals(size: float) -> int:
    """Decimals that four significant digits of a positive number need, without end zeros."""
    mantissa, exponent = f"{size:.3e}".split("e")
    return max(0, len(mantissa.rstrip("0")) - 2 - int(exponent))


def _number(value: Real, decimals: int) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return _typeset(f"{int(value):,}")
    x = float(value) + 0.0  # -0.0 becomes 0.0
    if not math.isfinite(x):
        return _typeset(f"{x}".replace("inf", "∞").replace("nan", "NaN"))
    # Fewer than two significant digits would be left, or more than six stand before the point.
    lost = 0 < abs(x) < 10.0 ** (1 - decimals) and _decimals(abs(x)) > decimals
    return _typeset(f"{x:.4g}" if lost or abs(x) >= 1e6 else f"{x:,.{decimals}f}")


def _typeset(number: str) -> str:
    """Python's notation to print's: a true minus, powers of ten."""
    mantissa, e, exponent = number.partition("e")
    power = f"\N{MULTIPLICATION SIGN}10{str(int(exponent)).translate(_SUPERSCRIPT)}" if e else ""
    return mantissa.replace("-", "\N{MINUS SIGN}") + power
