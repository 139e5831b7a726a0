from fractions import Fraction

import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.speech.abx.alignments import parse_textgrid
from remanence.speech.abx.items import HEADER, Items
from remanence.speech.abx.slicing import slice_frames

LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.9
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 0.9
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 0.9
            text = "say ""ah"" 5"
    item [2]:
        class = "TextTier"
        name = "clicks"
        xmin = 0
        xmax = 0.9
        points: size = 1
        points [1]:
            number = 0.25
            mark = "x"
    item [3]:
        class = "IntervalTier"
        name = "ann - phones"
        xmin = 0
        xmax = 0.9
        intervals: size = 5
        intervals [1]:
            xmin = 0
            xmax = 0.1
            text = ""
        intervals [2]:
            xmin = 0.1
            xmax = 0.30000000000000004
            text = "S"
        intervals [3]:
            xmin = 0.3
            xmax = 0.5
            text = "EY1"
        intervals [4]:
            xmin = 0.5
            xmax = 0.7
            text = "AA0"
        intervals [5]:
            xmin = 0.8
            xmax = 0.9
            text = "S"
"""
SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
0.9
<exists>
3
"IntervalTier"
"words"
0
0.9
1
0
0.9
"say ""ah"" 5"
"TextTier"
"clicks"
0
0.9
1
0.25
"x"
"IntervalTier"
"ann - phones"
0
0.9
5
0
0.1
""
0.1
0.30000000000000004
"S"
0.3
0.5
"EY1"
0.5
0.7
"AA0"
0.8
0.9
"S"
"""


def _rows(items):
    return [
        (str(items.file[i]), items.onset[i] / items.ticks, items.offset[i] / items.ticks,
         items.phone[i], items.prev[i], items.next[i], items.speaker[i])
        for i in range(len(items))
    ]  # fmt: skip


def _one(onset, offset):
    return Items.from_table({"file": ["a"], "phone": ["p"], "onset": [onset], "offset": [offset]})


@pytest.mark.parametrize("rate", [50, 100])
@pytest.mark.parametrize("text", [True, False])
def test_slices_of_the_published_table(rate, text):
    table = {
        (100, 0.2925, 0.4725): (29, 46),
        (50, 0.2925, 0.4725): (15, 23),
        (50, 0.3725, 0.5325): (19, 26),
        (100, 0.4325, 0.5725): (43, 56),
        (100, 0.005, 0.285): (0, 28),  # in floats 27
        (100, 0.0, 0.01): (0, 0),
    }
    for (hertz, *ends), (first, last) in table.items():
        if hertz != rate:
            continue
        item = _one(*(str(end) if text else end for end in ends))
        for slicing, stop in (("inclusive", last + 1), ("librilight", last)):
            start, end = slice_frames(item, {"a": 100}, frame_rate=rate, slicing=slicing)
            assert (start.item(), end.item()) == (first, max(stop, first))


def test_slices_of_frame_times_are_those_of_the_rate():
    rng = np.random.default_rng(0)
    onset = rng.integers(0, 400, 200) * 0.0025
    offset = onset + rng.integers(1, 60, 200) * 0.0025
    items = Items.from_table({"file": ["a"] * 200, "phone": range(200), "onset": onset,
                              "offset": offset})  # fmt: skip
    times = {"a": (torch.arange(130).double() + 0.5) / 100}
    for slicing in ("inclusive", "librilight"):
        by_rate = slice_frames(items, {"a": 130}, frame_rate=100, slicing=slicing)
        by_times = slice_frames(items, {"a": 130}, times=times, slicing=slicing)
        full = by_rate[0] < by_rate[1]
        np.testing.assert_array_equal(full, by_times[0] < by_times[1])
        np.testing.assert_array_equal(by_rate[0][full], by_times[0][full])
        np.testing.assert_array_equal(by_rate[1][full], by_times[1][full])


def test_slices_with_odd_rates_and_ends():
    items = Items.from_phn({"a": "128 384 p\n384 640 q\n"}, {"a": "s"}, sample_rate=22050)
    start, stop = slice_frames(items, {"a": 9}, frame_rate=Fraction(22050, 256))
    assert (start.tolist(), stop.tolist()) == ([0, 1], [2, 3])  # centres 128, 384, 640
    whole = Items.from_table({"file": ["a", "b"], "phone": ["p", "q"]})
    start, stop = slice_frames(whole, {"a": 3, "b": 0}, frame_rate=50)
    assert (start.tolist(), stop.tolist()) == ([0, 0], [3, 0])
    start, stop = slice_frames(_one(0.1, 0.2), {"a": 19}, frame_rate=100)
    assert (start.item(), stop.item()) == (10, 19)  # one frame short at the end


@pytest.mark.parametrize("text", [LONG, SHORT])
def test_textgrids_of_both_formats(text):
    items = Items.from_textgrid({"f": text}, {"f": "ann"}, relabel=lambda p: p.rstrip("012"))
    assert _rows(items) == [
        ("f", 0.1, 0.3, "S", "SIL", "EY", "ann"),
        ("f", 0.3, 0.5, "EY", "S", "AA", "ann"),
        ("f", 0.5, 0.7, "AA", "EY", "SIL", "ann"),
        ("f", 0.8, 0.9, "S", "SIL", "SIL", "ann"),
    ]
    triphones = Items.from_textgrid({"f": text}, {"f": "ann"}, span="triphone")
    assert _rows(triphones) == [("f", 0.1, 0.7, "EY1", "S", "AA0", "ann")]
    assert parse_textgrid(text, "words") == [(0, 900_000_000, 'say "ah" 5')]


@pytest.mark.parametrize("text", [LONG, SHORT])
def test_textgrids_with_remarks_and_bare_points(text):
    remarked = text.replace("0.9\n", '0.9 ! of 2 takes, "one" <lost>\n').replace("0.1", ".1")
    remarked = remarked.replace('TextGrid"\n', 'TextGrid"\n! made in 2020 by 3 "people"\n')
    remarked = remarked.replace('"S"', '"S!"')
    wanted = [(a, b, c.replace("S", "S!")) for a, b, c in parse_textgrid(text, "phones")]
    assert parse_textgrid(remarked, "phones") == wanted


def test_phn_and_frame_labels():
    phn = Items.from_phn({"u": "0 3050 h#\n3050 4559 sh\n4559 5723 ix\n"}, {"u": "s1"})
    assert _rows(phn) == [
        ("u", 3050 / 16000, 4559 / 16000, "sh", "SIL", "ix", "s1"),
        ("u", 4559 / 16000, 5723 / 16000, "ix", "sh", "SIL", "s1"),
    ]
    labels = Items.from_frame_labels({"u": [3, 3, 3, 7, -1, 7, 7]}, {"u": "s"}, rate=100)
    assert _rows(labels) == [
        ("u", 0, 0.03, "3", "SIL", "7", "s"),
        ("u", 0.03, 0.04, "7", "3", "SIL", "s"),
        ("u", 0.05, 0.07, "7", "SIL", "SIL", "s"),
    ]
    start, stop = slice_frames(labels, {"u": 7}, frame_rate=100)
    assert (start.tolist(), stop.tolist()) == ([0, 3, 5], [3, 4, 7])


def test_file_names():
    items = Items.from_file_names(["7_ann_0", "3_bob_1"], r"(?P<phone>\d)_(?P<speaker>[a-z]+)")
    assert [row[3] + row[6] for row in _rows(items)] == ["7ann", "3bob"]


def test_item_files_are_read_and_written(tmp_path):
    path = tmp_path / "a.item"
    path.write_text(f"{HEADER}\nf 0.2925 0.4725 p SIL q s1\nf 0.5 1 q p SIL s1\n\n")
    items = Items.read(path)
    assert items.onset.tolist() == [292_500_000, 500_000_000]
    items.write(tmp_path / "b.item")
    again = Items.read(tmp_path / "b.item")
    assert _rows(again) == _rows(items)
    assert len(items[items.phone == "q"]) == 1
    with pytest.raises(InputError, match="duration"):
        Items.from_table({"file": ["a"], "phone": ["p"]}).write(path)
    with pytest.raises(InputError, match="blank"):
        Items.from_frame_labels({"a b": [1]}, {"a b": "s"}).write(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_item_files_of_other_encodings_are_read(encoding, tmp_path):
    path = tmp_path / "a.item"
    path.write_text(f"{HEADER}\nf 0 1 é SIL q s1\n", encoding=encoding)
    assert Items.read(path).phone.tolist() == ["é"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"no text in UTF-8 or UTF-16"):
        Items.read(path)


def test_items_of_no_length_have_no_frame():
    phn = Items.from_phn({"u": "0 800 a\n800 800 b\n800 1600 c\n"}, {"u": "s"})
    grid = SHORT.replace("0.3\n0.5", "0.3\n0.3", 1).replace("0.5\n0.7", "0.3\n0.7")
    grid = Items.from_textgrid({"u": grid}, {"u": "s"})
    for items, which in ((phn, 1), (grid, 1)):
        assert items.onset[which] == items.offset[which]
        for rate in (10, 100, 1000):
            start, stop = slice_frames(items, {"u": rate}, frame_rate=rate)
            assert start[which] == stop[which]
    assert (phn.prev.tolist(), phn.next.tolist()) == (["SIL", "a", "b"], ["b", "c", "SIL"])
    centre = _one("0.005", "0.005")  # the centre of a frame
    times = {"a": torch.tensor([0.005])}
    for how in ({"frame_rate": 100}, {"times": times}):
        start, stop = slice_frames(centre, {"a": 1}, **how)
        assert start.item() == stop.item()


def test_items_are_found_by_their_file():
    rng = np.random.default_rng(0)
    files = rng.choice(list("edcba"), 50).tolist()
    items = Items.from_table({"file": files, "phone": range(50)})
    found = items.by_file()
    assert {name: places.tolist() for name, places in found.items()} == {
        name: [i for i, file in enumerate(files) if file == name] for name in set(files)
    }
    assert list(found) == list(dict.fromkeys(files))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head\nf 0 1 p q r\n", "line 2 has 6 words"),
        ("head\nf 0 x p q r s\n", "'x' is no time"),
        ("head\nf 0 nan p q r s\n", "is no time"),
        ("head\nf 1 0.5 p q r s\n", "ends before it begins"),
        ("head\nf 0 1e30 p q r s\n", "'1e30' is no time"),
        ("head\nf 1e30 inf p q r s\n", "is no time"),
        ("f 0 1 p q r s\nf 1 2 q p r s\n", "line 1 is an item: write the header '#file"),
        ("head\nf 0 1 p q r s\nf 0 1 p q r s\n", "listed twice"),
        ("head\nf 1 -1e-9 p q r s\n", "below 0"),
        ("head\n", "lists no items"),
        (None, r"cannot be read \(No such file or directory\): give a text file"),
    ],
)
def test_bad_item_files_are_refused(text, message, tmp_path):
    path = tmp_path / "a.item"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        Items.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Items.from_textgrid({"f": "hello"}, {"f": "s"}), "no TextGrid"),
        (lambda: Items.from_textgrid({"f": LONG[:900]}, {"f": "s"}), "damaged"),
        (lambda: Items.from_textgrid({"f": SHORT.replace("0.25", "x")}, {"f": "s"}), "damaged"),
        (lambda: Items.from_textgrid({"f": LONG}, {"f": "s"}, tier="clicks"), "no interval tier"),
        (lambda: Items.from_textgrid({"f": LONG}, {}), "no speaker"),
        (lambda: Items.from_textgrid({"f": LONG}, {"f": "s"}, span="word"), "span 'word'"),
        (lambda: Items.from_phn({"f": "0 1"}, {"f": "s"}), "f line 1"),
        (lambda: Items.from_phn({"f": "0 9 a\n8 12 b"}, {"f": "s"}), "begins before"),
        (lambda: Items.from_phn({"f": f"0 {10**30} a"}, {"f": "s"}), "f line 1: .* a later time"),
        (
            lambda: Items.from_phn({"f": "0 99999999999 a"}, {"f": "s"}, sample_rate=1),
            "after 1,000,000,000 s: check",
        ),
        (lambda: Items.from_phn({"f": "0 9 h#"}, {"f": "s"}), "hold no phones"),
        (lambda: Items.from_phn({"f": "0 9 a"}, {"f": "s"}, sample_rate=0), "rate 0"),
        (lambda: Items.from_file_names(["ab"], "a"), "no group"),
        (lambda: Items.from_file_names(["ab"], "(?P<phone>x)"), "does not match"),
        (lambda: Items.from_file_names(["ab"], "("), "no regular expression"),
        (lambda: Items.from_table({"file": ["a"]}), "lacks 'phone'"),
        (lambda: Items.from_table({"file": ["a"], "phone": ["p", "q"]}), "differ in length"),
        (lambda: Items.from_table({"file": [], "phone": []}), "no items"),
        (
            lambda: Items.from_table({"file": ["a"], "phone": ["p"], "onset": [0]}),
            "both or neither",
        ),
    ],
)
def test_bad_alignments_are_refused(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_rate": 50, "slicing": "exclusive"}, "slicing"),
        ({}, "either"),
        ({"frame_rate": 50, "times": {}}, "either"),
        ({"frame_rate": 0}, "above 0"),
        ({"frame_rate": 200}, "outside its 10 frames"),
        ({"times": {}}, "do not fit"),
        ({"times": {"a": torch.ones(10)}}, "do not rise"),
    ],
)
def test_bad_slicing_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        slice_frames(_one(0.1, 0.2), {"a": 10}, **options)
    with pytest.raises(InputError, match="no features of 'a'"):
        slice_frames(_one(0.1, 0.2), {}, frame_rate=50)
