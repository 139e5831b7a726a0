"""What `remanence search bench` found, as figures with intervals and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.figure import Figure

from remanence.jobs.search.bench_methods import CATALYZER, CATALYZER_OPQ, LONGEST, Row
from remanence.kit.report import Cell, Report, curve_figure
from remanence.kit.statistics import holm, mcnemar, proportion_interval
from remanence.search.choice import FEW, Comparison, advise
from remanence.search.heldout import telling_rank

RECALLS = (1, 10, 100)
SHOWN = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)  # points of a curve
LEVEL = 0.05  # at which the intervals behind the advice hold together


def compare(rows: Sequence[Row], dim: int) -> dict[str, Any]:
    """Return figures of all methods at one byte count.

    The best are chosen by recall@10, or by recall@1 where the best recall@10 is near 1. So is the
    best OPQ, on these very queries, which favours it. Differences to it are paired, query by query.

    Args:
        rows: What each did, on the same queries.
        dim: Dimension of the vectors.

    Returns:
        `methods`: a dictionary for each row, with its recall by R and interval, its recall at R =
        1 .. 100, and its difference to the best OPQ by R; `reference`: the name of the best OPQ, or
        None; `best`: that of the best code, or None; `rank`: the R that they were chosen by;
        `advice`: a sentence.
    """
    coded = [row for row in rows if row.failed is None and row.family is not None]
    rank = telling_rank(max((_share(row, 10) for row in coded), default=0.0))
    reference = _best([row for row in coded if row.family == "opq"], rank)
    best = _best(coded, rank)
    found = []
    for row in rows:
        entry = row.figures() | {"recall": {}, "curve": [], "against_opq": {}}
        if row.failed is None:
            entry["recall"] = {str(r): _recall(row, r) for r in RECALLS}
            entry["curve"] = [float((row.ranks < r).mean()) for r in range(1, LONGEST + 1)]
        found.append(entry)
    if reference is not None:
        others = [row for row in coded if row is not reference]
        entries = [entry for entry, row in zip(found, rows, strict=True) if row in others]
        for r in RECALLS:
            _add_differences(entries, others, reference, r)
    return {
        "methods": found,
        "reference": None if reference is None else reference.name,
        "best": None if best is None else best.name,
        "rank": rank,
        "advice": _advice(coded, dim, rank),
    }


def _best(rows: Sequence[Row], rank: int) -> Row | None:
    return max(rows, key=lambda row: _share(row, rank), default=None)


def _share(row: Row, rank: int) -> float:
    return float((row.ranks < rank).mean())


def _recall(row: Row, r: int) -> dict[str, float]:
    hits = row.ranks < r
    low, high = proportion_interval(int(hits.sum()), len(hits))
    return {"share": float(hits.mean()), "low": low, "high": high}


def _add_differences(
    entries: Sequence[dict[str, Any]], others: Sequence[Row], reference: Row, r: int
) -> None:
    tests = [mcnemar(row.ranks < r, reference.ranks < r) for row in others]
    corrected = holm([test.p_value for test in tests])
    for entry, test, p in zip(entries, tests, corrected, strict=True):
        entry["against_opq"][str(r)] = {
            "difference": test.difference,
            "low": test.interval.low,
            "high": test.interval.high,
            "p": test.p_value,
            "p_corrected": float(p),
        }


def _advice(coded: Sequence[Row], dim: int, rank: int) -> str:
    """Say whether the best catalyzer is worth it, or what is best where there is none."""
    ours = _best([row for row in coded if row.family in {CATALYZER, CATALYZER_OPQ}], rank)
    theirs = [row for row in coded if row.family not in {CATALYZER, CATALYZER_OPQ}]
    best = _best(coded, rank)
    if best is None:
        return "No method could be run."
    if ours is None:
        return (
            f"At {best.nbytes} bytes {best.name} has the highest recall@{rank}, "
            f"{_share(best, rank):.1%}; no catalyzer was compared."
        )
    right = ours.ranks < rank
    rows = []
    for row in theirs:
        hits = row.ranks < rank
        gap = mcnemar(right, hits, 1 - LEVEL / len(theirs)).interval  # which hold together
        rows.append(Comparison(row.name, float(right.mean()), float(hits.mean()), *gap))
    return advise(
        rows,
        rank=rank,
        nbytes=ours.nbytes,
        queries=len(right),
        # Where the model does not say, nothing is said of it.
        trained_on=FEW if ours.n_train is None else ours.n_train,
        in_dim=dim,
        method=ours.name,
    ).sentence


def build_report(results: Mapping[str, Any], sources: Sequence[str], *, resumed: bool) -> Report:
    """Write the report, but for the facts of the run.

    Args:
        results: What goes to `results.json`.
        sources: Base, queries and learn vectors, as the user wrote them.
        resumed: Whether methods were timed in two goes.
    """
    counts, sizes = results["counts"], results["sizes"]
    base, queries, learn = sources
    report = Report(
        f"What {' or '.join(sizes)} bytes a vector buy",
        f"{counts['base']:,} vectors of dimension {results['dim']}, {counts['queries']:,} queries",
    )
    for found in sizes.values():
        report.text(found["advice"])
    threads = results["threads"]
    report.text(
        f"All learned from the same {counts['learn']:,} vectors ({learn}), but for catalyzers, "
        f"which were trained before; coded the same base ({base}) and answered the same queries "
        f"({queries}) on the processor with {threads} thread{'s' * (threads > 1)}. Recall@R is the "
        "share of queries whose true nearest vector, by Euclidean distance of the vectors "
        "themselves, is among the first R found. Queries are not quantised, but by ITQ."
    )
    _warn(report, results, resumed=resumed)
    for size, found in sizes.items():
        report.section(f"{size} bytes")
        _tables(report, found, counts["queries"])
        drawn = _curves(found)
        if drawn is not None:
            report.figure(
                drawn,
                f"Recall@R of the best of each kind, by recall@{found['rank']}; all but the dashed "
                f"ones are codes of {size} bytes.",
                f"recall by length of the list at {size} bytes",
            )
    return report


def _warn(report: Report, results: Mapping[str, Any], *, resumed: bool) -> None:
    shared = results["shared"]
    if shared["learn and queries"] or shared["base and queries"]:
        report.text(
            f"Take care: {shared['learn and queries']:,} of the queries were learned from and "
            f"{shared['base and queries']:,} stand in the base, so that recall is too high."
        )
    if shared["learn and base"]:
        report.text(
            f"{shared['learn and base']:,} vectors of the base were learned from; on a base that "
            "grows later recall may be lower."
        )
    if resumed:
        report.text("This run was interrupted and went on: its methods were timed in several goes.")


def _tables(report: Report, found: Mapping[str, Any], queries: int) -> None:
    run = [entry for entry in found["methods"] if entry["failed"] is None]
    failed = [entry for entry in found["methods"] if entry["failed"] is not None]
    if run:
        header = ["method", *(word for r in RECALLS for word in (f"recall@{r}, %", "95 %"))]
        report.table(
            header,
            [
                [
                    entry["name"],
                    *(cell for r in RECALLS for cell in _cells(entry, r, found["best"])),
                ]
                for entry in run
            ],
            f"Over {queries:,} queries; intervals of Wilson. What is not quantised shows what its "
            "code could reach at best.",
        )
        report.table(
            ["method", "bytes a vector", "model, bytes", "learned from", "train, s", "encode, s",
             "search, s"],
            [
                [entry[name] for name in ("name", "stored", "model", "n_train", "train_seconds",
                                          "encode_seconds", "search_seconds")]
                for entry in run
            ],
            "Bytes are counted in what is stored. Encoding is that of the base, searching that of "
            "all queries in one batch, both with the mapping. A dash: not known, or not done here. "
            "A catalyzer's training took what its own run took, validation included. OPQ on its "
            "outputs says what OPQ learned from, and how long that took.",
        )  # fmt: skip
    if found["reference"] is not None:
        report.table(
            ["method", "difference, points", "95 %", "p", "p, corrected"],
            [
                [
                    entry["name"],
                    100 * gap["difference"],
                    f"{100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}",
                    gap["p"],
                    gap["p_corrected"],
                ]
                for entry in run
                if (gap := entry["against_opq"].get(str(found["rank"]))) is not None
            ],
            f"Recall@{found['rank']} minus that of {found['reference']}, the best OPQ on these "
            "queries, paired by query (McNemar's exact test; Holm's correction for all of this "
            "table).",
        )
    for entry in run:
        if entry["note"]:
            report.text(f"Take care: {entry['note']}.")
    for entry in failed:
        report.text(
            f"{entry['name'][:1].upper()}{entry['name'][1:]} was not run: {entry['failed']}."
        )


def _cells(entry: Mapping[str, Any], r: int, best: str) -> list[Any]:
    each = entry["recall"][str(r)]
    mark: Literal["best"] | None = "best" if entry["name"] == best else None
    return [
        Cell(100 * each["share"], mark),
        f"{100 * each['low']:.1f}\N{EN DASH}{100 * each['high']:.1f}",
    ]


def _curves(found: Mapping[str, Any]) -> Figure | None:
    """Draw the best of each family, and of what is not quantised."""
    best: dict[str, Mapping[str, Any]] = {}
    r = str(found["rank"])
    for entry in found["methods"]:
        if entry["failed"] is None:
            kind = entry["family"] or entry["name"].split()[0] + ", not quantised"
            if kind not in best or entry["recall"][r]["share"] > best[kind]["recall"][r]["share"]:
                best[kind] = entry
    if not best:
        return None
    figure: Figure = curve_figure(
        {
            entry["name"]: (SHOWN, [100 * entry["curve"][at - 1] for at in SHOWN], None, None)
            for entry in best.values()
        },
        "R",
        "recall@R, %",
    )
    axes = figure.axes[0]
    axes.set_xscale("log")
    ticks = (1, 2, 5, 10, 20, 50, 100)
    axes.set_xticks(ticks, [str(at) for at in ticks])
    axes.minorticks_off()
    for line, entry in zip(axes.lines, best.values(), strict=True):
        if entry["family"] is None:
            line.set_linestyle((0, (4, 3)))
    return figure
