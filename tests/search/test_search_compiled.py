"""The compiled codec against the torch code, bit for bit, and against exact integer arithmetic."""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remanence.errors import InputError
from remanence.search.lattice import compiled, ranking
from remanence.search.lattice.code import SphericalCode
from remanence.search.lattice.counting import shell_sizes
from remanence.search.lattice.gosset import E8Shell
from remanence.search.lattice.leaders import leaders
from remanence.search.lattice.sign import SignCode
from remanence.search.lattice.sphere import SphereLattice

SMALL = [(2, 25), (2, 1), (2, 65), (3, 9), (3, 146), (4, 7), (5, 5), (6, 6), (8, 3), (8, 8)]
LARGE = [(16, 21), (24, 79), (24, 217), (32, 36), (48, 30), (64, 66), (40, 78), (130, 4), (6, 500)]
EXTREMES = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -3e-39, 3e38, 1e-3, 2.0, -0.5, 5e-324, -1e308]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_codes(values: list[int], nbytes: int) -> Tensor:
    rows = [np.frombuffer(v.to_bytes(nbytes, "little"), np.uint8) for v in values]
    return torch.from_numpy(np.stack(rows))


def check(code: SphericalCode, codes: Tensor) -> None:
    """Both ways there and back are those of torch."""
    words, bad = code._ranking._unrank(codes)
    assert bad == -1
    assert torch.equal(code.unrank(codes), words)
    assert torch.equal(code.rank(words), codes)
    assert torch.equal(code._ranking._rank(words)[0], codes)


# --- numbers


@pytest.mark.parametrize(
    "code", [SphereLattice(*s) for s in SMALL] + [E8Shell(1), E8Shell(2), SignCode(1), SignCode(11)]
)
def test_small_codes_are_those_of_torch(code: SphericalCode) -> None:
    check(code, as_codes(list(range(code.nv)), code.nbytes))


@pytest.mark.parametrize(
    "code",
    [SphereLattice(*s) for s in LARGE]
    + [E8Shell(9), SignCode(63), SignCode(64), SignCode(65), SignCode(130)],
)
def test_large_codes_are_those_of_torch(code: SphericalCode) -> None:
    generator = np.random.default_rng(0)
    values = [int.from_bytes(generator.bytes(code.nbytes + 2)) % code.nv for _ in range(300)]
    edges = [2**k + i for k in (32, 48, 63, 64, 96, 128) for i in (-1, 0, 1)]
    values += [0, code.nv - 1, code.nv // 2, *(v for v in edges if v < code.nv)]
    codes = as_codes(values, code.nbytes)
    check(code, codes)
    numbers = [int.from_bytes(bytes(r.tolist()), "little") for r in code.rank(code.unrank(codes))]
    assert numbers == values


@pytest.mark.parametrize("code", [SphereLattice(24, 79), SphereLattice(48, 30), E8Shell(3)])
@pytest.mark.parametrize("place", [0, 63, 64, 99, 129])
def test_the_first_code_beyond_the_last_is_named(code: SphericalCode, place: int) -> None:
    values = [code.nv - 1] * 130
    values[place] = code.nv
    values[129] = 256**code.nbytes - 1
    with pytest.raises(InputError, match=f"^code {place} is not below {code.nv}"):
        code.unrank(as_codes(values, code.nbytes))


@pytest.mark.parametrize("code", [SphereLattice(24, 79), SphereLattice(48, 30), E8Shell(3)])
def test_the_first_row_that_is_no_point_is_named(code: SphericalCode) -> None:
    points = code.unrank(as_codes([0, 5, code.nv - 1] * 40, code.nbytes)).long()
    for value in (-(2**63), -128, -10, 10, 127, 128, 256, 2**32, 2**63 - 1):
        for column in (0, code.dim - 1):
            wrong = points.clone()
            wrong[71:73, column] = value
            with pytest.raises(InputError, match=r"^row 71 is no point of the code"):
                code.rank(wrong)
    for row in (torch.zeros(code.dim), points[0] * 2, points[0].abs() - 1):
        wrong = points.clone()
        wrong[64] = row
        assert code._ranking._rank(wrong)[1] == 64
        with pytest.raises(InputError, match=r"^row 64 is no point of the code"):
            code.rank(wrong)


# --- nearest point


def awkward(n: int, d: int) -> Tensor:
    """Vectors with ties, zeros and values far apart."""
    plain = drawn(n, d)
    few = plain * (drawn(n, d, 1) > 1)
    wide = plain * torch.exp(20 * drawn(n, d, 2))
    picked = torch.tensor(EXTREMES, dtype=torch.float64)[
        torch.randint(len(EXTREMES), (n, d), generator=torch.Generator().manual_seed(3))
    ]
    flat = torch.ones(1, d, dtype=torch.float64)
    return torch.cat([plain, plain.round(), (3 * plain).round(), few, wide, picked, flat, 0 * flat])


@pytest.mark.parametrize(("d", "r2"), SMALL + LARGE)
def test_points_are_those_of_torch(d: int, r2: int) -> None:
    lattice = SphereLattice(d, r2)
    x = awkward(80 if len(lattice.leaders) < 1000 else 16, d)
    kinds = [x, x.float().clamp(-3e38, 3e38), x.bfloat16().clamp(-3e38, 3e38)]
    for kind in kinds:
        found = lattice.quantize(kind)
        assert torch.equal(found, lattice._match(kind))
        assert (found.long().square().sum(1) == r2).all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(EXTREMES), min_size=5, max_size=5)
    | st.lists(st.floats(-2, 2, width=32), min_size=5, max_size=5),
    st.integers(1, 300),
)
def test_no_leader_scores_more(row: list[float], r2: int) -> None:
    """In exact arithmetic, up to the rounding of sizes."""
    if not shell_sizes(5, r2)[r2]:
        return
    found = SphereLattice(5, r2).quantize(torch.tensor([row], dtype=torch.float64))[0].tolist()
    sizes = sorted((abs(Fraction(v)) for v in row), reverse=True)
    best = max(
        sum(s * a for s, a in zip(sizes, leader, strict=True)) for leader in leaders(5, r2).tolist()
    )
    mine = sum(Fraction(v) * a for v, a in zip(row, found, strict=True))
    assert best - mine <= sizes[0] * math.isqrt(5 * r2) / 2**44


def test_ties_take_the_first_leader() -> None:
    lattice = SphereLattice(5, 9)  # (3, 0, 0, 0, 0) before (2, 2, 1, 0, 0)
    x = torch.zeros(4, 5)
    x[:3, :3] = torch.tensor([[5.0, 2.0, 1.0], [-0.0, -5, 2.5], [1e-45, 0, 0]])
    expected = [[3, 0, 0, 0, 0], [0, -3, 0, 0, 0], [3, 0, 0, 0, 0], [3, 0, 0, 0, 0]]
    assert lattice.quantize(x).tolist() == expected
    assert lattice._match(x).tolist() == expected


# --- both


def test_layout_type_and_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    lattice = SphereLattice(24, 79)
    x = drawn(1000, 24).float()
    points, codes = lattice.quantize(x), lattice.encode(x)
    wide = torch.cat([x, x], 1)[:, 24:]
    assert torch.equal(lattice.quantize(wide), points)
    assert torch.equal(lattice.quantize(x.T.contiguous().T), points)
    assert torch.equal(lattice.quantize(x.requires_grad_()), points)
    assert torch.equal(lattice.rank(points.T.contiguous().T), codes)
    assert torch.equal(lattice.rank(torch.stack([points, points], 2)[:, :, 1].int()), codes)
    assert torch.equal(lattice.unrank(torch.cat([codes, codes], 1)[:, 8:]), points)
    assert torch.equal(lattice.unrank(codes.flip(0)), points.flip(0))
    monkeypatch.setattr(compiled, "SHARE", 10)
    torch.set_num_threads(3)
    assert torch.equal(lattice.encode(x), codes)
    assert torch.equal(lattice.unrank(codes), points)
    beyond = codes.clone()
    beyond[500:] = 255
    with pytest.raises(InputError, match=r"^code 500 "):
        lattice.unrank(beyond)
    monkeypatch.setattr(ranking, "CHUNK", 70)
    with pytest.raises(InputError, match=r"^code 500 "):
        lattice.unrank(beyond)


@pytest.mark.parametrize("code", [SphereLattice(24, 79), SphereLattice(48, 30), SignCode(9)])
def test_no_rows(code: SphericalCode) -> None:
    points = code.quantize(torch.zeros(0, code.dim))
    assert points.shape == (0, code.dim)
    assert code.rank(points).shape == (0, code.nbytes)
    assert code.unrank(code.rank(points)).shape == (0, code.dim)


def test_the_first_row_that_is_refused_is_told_from_any_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(compiled, "SHARE", 4)
    for refused in ((), (7,), (9, 6), (3, 8), (10,)):
        told = compiled._first_refused(
            lambda start, stop, rows=refused: min(
                (r for r in rows if start <= r < stop), default=-1
            ),
            11,
        )
        assert told == min(refused, default=-1)
