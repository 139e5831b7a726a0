"""Items: which stretch of which file is which phone, in which context, said by whom.

Times are whole ticks, so that no rounding of floats moves an item by a frame.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from remanence.errors import InputError
from remanence.speech.abx.alignments import (
    LATEST,
    TICKS,
    parse_phn,
    parse_textgrid,
    runs_of_labels,
    ticks_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from remanence.speech.abx.alignments import Interval

    Texts = NDArray[np.object_]
    Integers = NDArray[np.int64]

WHOLE = -1  # the offset of an item that lasts to the end of its file
SILENCE = "SIL"
SILENCES = frozenset({"", "sil", "sp", "spn", "SIL", "h#", "#h", "pau", "epi", "<eps>", "-1"})
HEADER = "#file onset offset #phone prev-phone next-phone speaker"

_TIME = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_ITEM = re.compile(rf"\s*\S+\s+{_TIME}\s+{_TIME}(?:\s+\S+){{4}}\s*")

Span = Literal["phone", "triphone"]


@dataclass(frozen=True, eq=False)
class Items:
    """Tokens of phones, or of whatever is to be told apart: words, digits, units, images.

    Attributes:
        file: Names of the features that they lie in (n,).
        onset: Beginnings (n,), int64 ticks.
        offset: Ends (n,), int64 ticks; `WHOLE` is the end of the file. An item of no length is one
            without frames.
        phone: What they are (n,).
        prev: The phone before (n,).
        next: The phone after (n,).
        speaker: Who says it (n,).
        ticks: Ticks of a second.
    """

    file: Texts
    onset: Integers
    offset: Integers
    phone: Texts
    prev: Texts
    next: Texts
    speaker: Texts
    ticks: int = TICKS

    def __post_init__(self) -> None:
        if not len(self.file):
            raise InputError("there are no items: give a list with at least two phones")
        if (
            len({len(getattr(self, field.name)) for field in fields(self) if field.name != "ticks"})
            > 1
        ):
            raise InputError("the columns of items differ in length: give each item every column")
        wrong = (self.onset < 0) | ((self.offset < self.onset) & (self.offset != WHOLE))
        if wrong.any():
            i = int(wrong.argmax())
            raise InputError(f"{self.describe(i)} ends before it begins: mend its onset and offset")
        late = np.maximum(self.onset, self.offset) > LATEST * self.ticks
        if late.any():
            which = self.describe(int(late.argmax()))
            raise InputError(f"{which}, lies after {LATEST:,} s: check its times and their rate")
        rows = zip(
            self.file, self.onset, self.offset, self.phone, self.prev, self.next, self.speaker,
            strict=True,
        )  # fmt: skip
        seen = set()
        for i, row in enumerate(rows):
            if row in seen:
                raise InputError(f"{self.describe(i)} is listed twice: list each token once")
            seen.add(row)

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: Any) -> Items:
        """Return the items at an index array, a mask or a slice."""
        columns = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "ticks"}
        return Items(**columns, ticks=self.ticks)

    def by_file(self) -> dict[str, Integers]:
        """Return the places of each file's items, rising; files in order of their first item."""
        number = {file: i for i, file in enumerate(dict.fromkeys(self.file))}
        files = np.array([number[file] for file in self.file], np.int64)
        order = np.argsort(files, kind="stable")
        edges = np.searchsorted(files[order], np.arange(1, len(number)))
        return dict(zip(number, np.split(order, edges), strict=True))

    def describe(self, i: int) -> str:
        """Return an item in words, for messages."""
        end = "end" if self.offset[i] == WHOLE else f"{self.offset[i] / self.ticks:.9g} s"
        begin = f"{self.onset[i] / self.ticks:.9g} s"
        return f"item {self.phone[i]!r} of {self.file[i]!r}, {begin} to {end}"

    @classmethod
    def read(cls, path: str | Path) -> Items:
        """Read an item file: a header, then `file onset offset phone prev next speaker` a line.

        Text is in UTF-8, or in UTF-16 with a mark of its byte order.

        Raises:
            InputError: The file cannot be read, has no header, or a line is of another form.
        """
        try:
            data = Path(path).read_bytes()
            wide = data[:2] in {BOM_UTF16_LE, BOM_UTF16_BE}
            header, *lines = data.decode("utf-16" if wide else "utf-8-sig").splitlines() or [""]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "no text in UTF-8 or UTF-16"
            raise InputError(
                f"item file {path} cannot be read ({reason}): give a text file with one item a line"
            ) from None
        # Every reader skips the first line: an item there would be lost without a word.
        if _ITEM.fullmatch(header):
            raise InputError(f"{path} line 1 is an item: write the header '{HEADER}' above it")
        rows = [(i, line.split()) for i, line in enumerate(lines, 2) if line.strip()]
        for i, row in rows:
            if len(row) != 7:
                raise InputError(
                    f"{path} line {i} has {len(row)} words: write the seven of '{HEADER}'"
                )
        if not rows:
            raise InputError(f"{path} lists no items: write a header and one item a line")
        columns: list[tuple[str, ...]] = list(zip(*(row for _, row in rows), strict=True))
        return cls.from_table(
            dict(zip(("file", "onset", "offset", "phone", "prev", "next", "speaker"), columns,
                     strict=True))
        )  # fmt: skip

    def write(self, path: str | Path) -> None:
        """Write an item file, which `read` reads back; names may hold no blanks.

        Raises:
            InputError: A name holds a blank or is empty, or an item lasts to the end of its file.
        """
        if (self.offset == WHOLE).any():
            raise InputError("an item file needs offsets: give whole files their duration first")
        lines = [HEADER]
        for i in range(len(self)):
            names = self.file[i], self.phone[i], self.prev[i], self.next[i], self.speaker[i]
            if any(len(name.split()) != 1 for name in names):
                raise InputError(f"{self.describe(i)} has a name with a blank: rename it")
            times = (f"{t / self.ticks:.9f}".rstrip("0") for t in (self.onset[i], self.offset[i]))
            onset, offset = (time + "0" if time[-1] == "." else time for time in times)
            lines.append(" ".join((names[0], onset, offset, *names[1:])))
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def from_table(cls, table: Mapping[str, Sequence[Any]]) -> Items:
        """Make items of columns: a dict of lists, a DataFrame.

        Args:
            table: `file` and `phone`; and, where there are any, `onset` and `offset` in seconds
                (without them an item is a whole file), `prev`, `next` and `speaker`. Times are read
                as decimals to the nanosecond: 0.285 is 0.285.

        Raises:
            InputError: A column is missing, or a time is none.
        """
        for column in ("file", "phone"):
            if column not in table:
                raise InputError(
                    f"the table of items lacks {column!r}: give file and phone at least"
                )
        if ("onset" in table) != ("offset" in table):
            raise InputError("the table of items has one of onset and offset: give both or neither")
        n = len(table["file"])
        onset, offset = np.zeros(n, np.int64), np.full(n, WHOLE, np.int64)
        if "onset" in table:
            onset, offset = (
                np.array([ticks_of(t, f"{c} {i + 1}") for i, t in enumerate(table[c])], np.int64)
                for c in ("onset", "offset")
            )
            if (offset < 0).any():
                raise InputError("an offset is below 0 s: give the time from the file's beginning")

        def texts(column: str) -> Texts:
            values = (
                table[column] if column in table else [SILENCE if column != "speaker" else "1"] * n
            )
            return np.array([str(value) for value in values], dtype=object)

        return cls(
            texts("file"), onset, offset, texts("phone"), texts("prev"), texts("next"),
            texts("speaker"),
        )  # fmt: skip

    @classmethod
    def from_file_names(cls, names: Iterable[str], pattern: str) -> Items:
        """Make an item of each file whose name tells what it is.

        Args:
            names: Names of features.
            pattern: Regular expression for the beginning of a name, with the group `phone` and
                perhaps `speaker`, `prev` and `next`: `(?P<phone>[0-9]+)_(?P<speaker>[a-z]+)_`.

        Raises:
            InputError: The pattern is none, lacks `phone`, or a name does not match it.
        """
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise InputError(f"{pattern!r} is no regular expression: {error}") from None
        if "phone" not in compiled.groupindex:
            raise InputError(f"pattern {pattern!r} has no group (?P<phone>...): add it")
        table: dict[str, list[str]] = {"file": [], **{group: [] for group in compiled.groupindex}}
        for name in names:
            match = compiled.match(name)
            if match is None:
                raise InputError(f"file name {name!r} does not match {pattern!r}: mend the pattern")
            table["file"].append(name)
            for group, value in match.groupdict().items():
                table[group].append(value or "")
        return cls.from_table(table)

    @classmethod
    def from_textgrid(
        cls,
        texts: Mapping[str, str],
        speakers: Mapping[str, str],
        *,
        tier: str = "phones",
        span: Span = "phone",
        relabel: Callable[[str], str] | None = None,
        silences: Collection[str] = SILENCES,
    ) -> Items:
        """Make items of the phones in TextGrids, long or short format.

        Args:
            texts: The text of each file's TextGrid.
            speakers: The speaker of each file.
            tier: The name of the tier of phones.
            span: `phone`, or `triphone` for items from the phone before to the phone after.
            relabel: What a label becomes, such as `lambda p: p.rstrip("012")` without stress.
            silences: Labels that are no phones.

        Raises:
            InputError: A text is no TextGrid or lacks the tier, a file has no speaker, or there
                are no phones.
        """
        aligned = {name: parse_textgrid(text, tier, name) for name, text in texts.items()}
        return _from_intervals(aligned, speakers, TICKS, span, relabel, silences)

    @classmethod
    def from_phn(
        cls,
        texts: Mapping[str, str],
        speakers: Mapping[str, str],
        *,
        sample_rate: int = 16000,
        span: Span = "phone",
        relabel: Callable[[str], str] | None = None,
        silences: Collection[str] = SILENCES,
    ) -> Items:
        """Make items of TIMIT .phn files, whose times are samples; see `from_textgrid`."""
        _check_rate(sample_rate)
        aligned = {name: parse_phn(text, name) for name, text in texts.items()}
        return _from_intervals(aligned, speakers, sample_rate, span, relabel, silences)

    @classmethod
    def from_frame_labels(
        cls,
        labels: Mapping[str, Sequence[Any]],
        speakers: Mapping[str, str],
        *,
        rate: int = 100,
        span: Span = "phone",
        relabel: Callable[[str], str] | None = None,
        silences: Collection[str] = SILENCES,
    ) -> Items:
        """Make items of the runs of equal labels, `rate` a second; see `from_textgrid`.

        Two tokens of one phone without anything between them become one.
        """
        _check_rate(rate)
        aligned = {name: runs_of_labels(row) for name, row in labels.items()}
        return _from_intervals(aligned, speakers, rate, span, relabel, silences)


def _check_rate(rate: int) -> None:
    if not isinstance(rate, int) or rate < 1:
        raise InputError(f"rate {rate}: give a whole number a second, at least 1")


def _from_intervals(
    aligned: Mapping[str, list[Interval]],
    speakers: Mapping[str, str],
    ticks: int,
    span: Span,
    relabel: Callable[[str], str] | None,
    silences: Collection[str],
) -> Items:
    if span not in {"phone", "triphone"}:
        raise InputError(f"span {span!r} is unknown: give 'phone' or 'triphone'")
    rows = []
    for name, intervals in aligned.items():
        if name not in speakers:
            raise InputError(f"file {name!r} has no speaker: name the speaker of each file")
        for (_, end, _), (start, _, label) in pairwise(intervals):
            if start < end:
                raise InputError(
                    f"{name!r}: {label!r} begins before the one before it ends: mend it"
                )
        phones = [
            (onset, offset, SILENCE if label in silences else relabel(label) if relabel else label)
            for onset, offset, label in intervals
        ]
        for i, (onset, offset, label) in enumerate(phones):
            if label == SILENCE:
                continue
            before = phones[i - 1] if i and phones[i - 1][1] == onset else None
            after = phones[i + 1] if i + 1 < len(phones) and phones[i + 1][0] == offset else None
            labels = [other[2] if other else SILENCE for other in (before, after)]
            begin, end = onset, offset
            if span == "triphone":
                if before is None or after is None or SILENCE in labels:
                    continue
                begin, end = before[0], after[1]
            rows.append((name, begin, end, label, *labels, speakers[name]))
    if not rows:
        raise InputError(
            f"the alignments of {len(aligned)} files hold no {span}s: check the labels"
        )
    file, onsets, offsets, phone, prev, following, speaker = np.array(rows, dtype=object).T
    times = onsets.astype(np.int64), offsets.astype(np.int64)
    return Items(file, *times, phone, prev, following, speaker, ticks)


def most_common(values: Iterable[str]) -> str:
    """Return up to three values and how many more there are, for messages."""
    counts = Counter(values)
    shown = ", ".join(repr(value) for value, _ in counts.most_common(3))
    return shown + (f" and {len(counts) - 3} more" if len(counts) > 3 else "")
