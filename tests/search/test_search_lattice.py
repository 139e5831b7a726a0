"""Spherical codes against brute force, theta series and the counts of arXiv 1806.03198."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remanence.errors import InputError
from remanence.search.lattice import code as code_module
from remanence.search.lattice import packing, ranking
from remanence.search.lattice.code import SphericalCode
from remanence.search.lattice.counting import radius_for_bits, shell_sizes
from remanence.search.lattice.gosset import E8Shell
from remanence.search.lattice.leaders import class_size, leader_count, leaders
from remanence.search.lattice.sign import SignCode
from remanence.search.lattice.sphere import SphereLattice

# dim, r2, points, leaders; where the paper's table has no count, its bits.
SHELLS = [
    (16, 4, 29_152, 2),
    (16, 21, 3_392_205_824, 11),
    (24, 3, 16_192, 1),
    (24, 10, 2_319_457_632, 4),
    (24, 79, 17_319_684_851_070_915_840, 256),
    (32, 3, 39_680, 1),
    (32, 8, 2_724_906_944, 3),
    (32, 36, 15_221_194_949_728_018_112, 41),
    (40, 2, 3_120, 1),
    (40, 7, 2_392_224_640, 2),
    (40, 24, 12_076_325_113_647_462_720, 16),
    (48, 30, 311_097_167_722_066_085_728_512, 27),
]
SMALL = [(2, 25), (3, 9), (4, 7), (5, 5), (6, 6), (8, 3), (8, 8)]


def drawn(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def numbers(codes: Tensor) -> list[int]:
    return [int.from_bytes(bytes(row.tolist()), "little") for row in codes]


def as_codes(values: list[int], nbytes: int) -> Tensor:
    return torch.tensor([list(v.to_bytes(nbytes, "little")) for v in values], dtype=torch.uint8)


def shell(d: int, r2: int) -> Tensor:
    """List all points by plain enumeration."""
    most = math.isqrt(r2)
    grid = np.array(list(itertools.product(range(-most, most + 1), repeat=d)), dtype=np.int8)
    return torch.from_numpy(grid[(grid.astype(int) ** 2).sum(1) == r2])


def e8(m: int) -> Tensor:
    """List the points of E8 of norm 2m, doubled."""
    most = math.isqrt(8 * m)
    found = []
    for parity in (0, 1):
        values = [v for v in range(-most, most + 1) if v % 2 == parity]
        grid = np.array(list(itertools.product(values, repeat=8)), dtype=np.int8)
        sums = grid.astype(int)
        found.append(grid[((sums**2).sum(1) == 8 * m) & (sums.sum(1) % 4 == 0)])
    return torch.from_numpy(np.concatenate(found))


def check_nearest(code: SphericalCode, every: Tensor, x: Tensor) -> None:
    """The point found is in the code, and none is closer."""
    found = code.quantize(x)
    assert found.dtype == torch.int8
    members = {tuple(row) for row in every.tolist()}
    assert all(tuple(row) in members for row in found.tolist())
    best = (x.double() @ every.double().T).amax(1)
    mine = (x.double() * found).sum(1)
    assert (best - mine).max().item() <= 1e-12 * x.double().abs().sum(1).max().item()


# --- counts


@pytest.mark.parametrize(("d", "r2", "points", "atoms"), SHELLS)
def test_published_counts(d: int, r2: int, points: int, atoms: int) -> None:
    lattice = SphereLattice(d, r2)
    assert lattice.nv == points == shell_sizes(d, r2)[r2]
    assert len(lattice.leaders) == leader_count(d, r2) == atoms
    assert sum(class_size(row) for row in lattice.leaders.tolist()) == points
    assert lattice.bits == math.ceil(math.log2(points))
    assert lattice.nbytes == math.ceil(lattice.bits / 8)


@pytest.mark.parametrize(("d", "r2"), SMALL)
def test_leaders_are_the_points_up_to_order_and_signs(d: int, r2: int) -> None:
    every = shell(d, r2)
    classes = {tuple(sorted((abs(v) for v in row), reverse=True)) for row in every.tolist()}
    assert {tuple(row) for row in leaders(d, r2).tolist()} == classes
    assert shell_sizes(d, r2)[r2] == SphereLattice(d, r2).nv == len(every)


@pytest.mark.parametrize(
    ("d", "bits", "r2"),
    [
        (16, 15, 4),
        (16, 32, 21),
        (16, 40, 47),
        (24, 24, 6),
        (24, 32, 10),
        (24, 40, 17),
        (24, 56, 47),
        (24, 64, 79),
        (24, 80, 217),
        (32, 16, 3),
        (32, 64, 36),
        (32, 80, 76),
        (32, 96, 159),
        (40, 64, 24),
        (40, 80, 43),
        (40, 96, 78),
        (40, 128, 253),
        (48, 96, 51),
        (48, 128, 135),
        (64, 80, 22),
        (64, 96, 32),
        (64, 128, 66),
    ],
)
def test_published_radii(d: int, bits: int, r2: int) -> None:
    assert radius_for_bits(d, bits) == r2


@pytest.mark.parametrize(("d", "bits"), [(3, 7), (4, 13), (5, 17), (8, 22), (9, 25)])
def test_every_radius_is_looked_at(d: int, bits: int) -> None:
    """The largest shell within the budget lies beyond shells that are too large."""
    sizes = shell_sizes(d, 1000 if d > 4 else 127**2)
    r2 = radius_for_bits(d, bits)
    assert sizes[r2] == max(size for size in sizes[1:] if size <= 2**bits)
    assert max(sizes[1:r2]) > 2**bits


@pytest.mark.parametrize(("m", "points"), list(enumerate([240, 2160, 6720, 17520, 30240], 1)))
def test_shells_of_e8(m: int, points: int) -> None:
    assert E8Shell(m).nv == points == 240 * sum(k**3 for k in range(1, m + 1) if m % k == 0)


# --- nearest point


@pytest.mark.parametrize(("d", "r2"), SMALL)
def test_nearest_is_nearest_by_brute_force(d: int, r2: int) -> None:
    check_nearest(SphereLattice(d, r2), shell(d, r2), drawn(500, d))


@pytest.mark.parametrize("m", [1, 2])
def test_nearest_of_e8_by_brute_force(m: int) -> None:
    every = e8(m)
    assert len(every) == E8Shell(m).nv
    check_nearest(E8Shell(m), every, drawn(3000, 8))
    check_nearest(E8Shell(m), every, drawn(500, 8).round())  # zeros and ties


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -3e-39, 3e38, 1e-3, 2.0, -0.5]),
        min_size=6,
        max_size=6,
    ),
    st.sampled_from([(6, 6), (6, 9), (6, 1)]),
)
def test_zeros_ties_and_extremes_stay_on_the_sphere(
    row: list[float], which: tuple[int, int]
) -> None:
    check_nearest(SphereLattice(*which), shell(*which), torch.tensor([row]))


@pytest.mark.parametrize(
    ("d", "r2", "cosine"),
    [
        (16, 4, 0.8091),
        (16, 21, 0.9632),
        (24, 3, 0.6781),
        (24, 10, 0.8891),
        (24, 79, 0.9860),
        (32, 36, 0.9604),
        (40, 24, 0.9257),
    ],
)
def test_mean_cosine_on_uniform_vectors(d: int, r2: int, cosine: float) -> None:
    lattice = SphereLattice(d, r2)
    x = torch.nn.functional.normalize(drawn(20_000, d), dim=1)
    got = (x * lattice.dequantize(lattice.quantize(x))).sum(1)
    assert got.mean().item() == pytest.approx(cosine, abs=1e-3)


def test_codes_do_not_depend_on_batch_or_type(monkeypatch: pytest.MonkeyPatch) -> None:
    lattice = SphereLattice(24, 79)
    x = drawn(300, 24).bfloat16()
    whole = lattice.encode(x)
    assert torch.equal(torch.cat([lattice.encode(row[None]) for row in x]), whole)
    assert torch.equal(lattice.encode(x.double() * 8), whole)
    monkeypatch.setattr(code_module, "ENTRIES", 1)
    monkeypatch.setattr("remanence.search.lattice.sphere.ENTRIES", 1)
    monkeypatch.setattr(ranking, "CHUNK", 7)
    assert torch.equal(lattice.encode(x), whole)
    assert torch.equal(lattice.unrank(whole), lattice.quantize(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lattice.encode(x), whole)


def test_integers_are_vectors_too() -> None:
    x = torch.tensor([[-128, 1, 0], [5, -5, 127]], dtype=torch.int8)
    check_nearest(SphereLattice(3, 9), shell(3, 9), x)


def test_nothing_in_gives_nothing_out() -> None:
    lattice = SphereLattice(24, 79)
    assert lattice.encode(torch.zeros(0, 24)).shape == (0, 8)
    assert lattice.decode(torch.zeros(0, 8, dtype=torch.uint8)).shape == (0, 24)


# --- ranks


@pytest.mark.parametrize("code", [SphereLattice(*s) for s in SMALL] + [E8Shell(2), SignCode(11)])
def test_ranks_are_a_bijection(code: SphericalCode) -> None:
    codes = as_codes(list(range(code.nv)), code.nbytes)
    points = code.unrank(codes)
    assert (points.long().square().sum(1) == code.r2).all()
    assert len(points.unique(dim=0)) == code.nv
    assert torch.equal(code.rank(points), codes)


@pytest.mark.parametrize(
    ("d", "r2"),
    [(16, 4), (24, 3), (32, 3), (40, 2), (16, 21), (24, 79), (32, 36), (48, 30), (64, 66)],
)
def test_large_codes_there_and_back(d: int, r2: int) -> None:
    lattice = SphereLattice(d, r2)
    generator = np.random.default_rng(0)
    values = [int.from_bytes(generator.bytes(lattice.nbytes + 2)) % lattice.nv for _ in range(300)]
    values += [0, 1, lattice.nv - 1, lattice.nv // 2]
    values += [v for v in (2**48 - 1, 2**48, 2**63 - 1, 2**63, 2**63 + 1) if v < lattice.nv]
    codes = as_codes(values, lattice.nbytes)
    points = lattice.unrank(codes)
    assert (points.long().square().sum(1) == r2).all()
    assert len(points.unique(dim=0)) == len(set(values))
    assert numbers(lattice.rank(points)) == values


def test_ranks_are_in_the_order_of_the_letters() -> None:
    """An independent, slow ranking in Python integers (0, 1, -1, 2, -2, ...)."""
    d, r2 = 24, 79
    sizes = [shell_sizes(k, r2) for k in range(d)]
    lattice = SphereLattice(d, r2)
    points = lattice.quantize(drawn(20, d))
    expected = []
    for row in points.tolist():
        total, rest = 0, r2
        for i, value in enumerate(row):
            place = 2 * abs(value) - (value > 0)
            for earlier in range(place):
                square = ((earlier + 1) // 2) ** 2
                total += sizes[d - 1 - i][rest - square] if square <= rest else 0
            rest -= value**2
        expected.append(total)
    assert numbers(lattice.rank(points)) == expected
    assert max(expected) > 2**63


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(1, 60), st.data())
def test_any_shell_there_and_back(d: int, r2: int, data: st.DataObject) -> None:
    size = shell_sizes(d, r2)[r2]
    if not size:
        with pytest.raises(InputError, match="no integer vector"):
            SphereLattice(d, r2)
        return
    lattice = SphereLattice(d, r2)
    values = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    points = lattice.unrank(as_codes(values, lattice.nbytes))
    assert numbers(lattice.rank(points)) == values
    assert torch.equal(lattice.quantize(points), points)  # a point is its own nearest


@pytest.mark.parametrize("code", [SphereLattice(24, 79), SphereLattice(48, 30), E8Shell(3)])
def test_codes_beyond_the_last_are_refused(code: SphericalCode) -> None:
    for value in (code.nv, code.nv + 1, 256**code.nbytes - 1):
        with pytest.raises(InputError, match="code 1 is not below"):
            code.unrank(as_codes([code.nv - 1, value], code.nbytes))


@pytest.mark.parametrize("dim", [1, 8, 48, 63, 64, 96, 130])
def test_signs_are_one_bit_each(dim: int) -> None:
    code = SignCode(dim)
    x = drawn(50, dim)
    points = torch.where(x < 0, -1, 1).to(torch.int8)
    codes = code.encode(x)
    assert code.bits == dim
    assert codes.shape == (50, math.ceil(dim / 8))
    assert torch.equal(code.unrank(codes), points)
    assert numbers(code.rank(torch.ones(1, dim, dtype=torch.int8))) == [0]
    assert [number >> (dim - 1) for number in numbers(codes)] == (x[:, 0] < 0).int().tolist()
    hamming = np.unpackbits((codes[:1] ^ codes).numpy(), axis=1).sum(1)
    assert (hamming == (points[:1] != points).sum(1).numpy()).all()


@pytest.mark.parametrize(("d", "r2"), [(24, 3), (24, 10), (24, 79), (8, 3)])
def test_packed_codes_hold_no_spare_bits(d: int, r2: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK", 16)
    lattice = SphereLattice(d, r2)
    codes = lattice.encode(drawn(53, d))
    stream = packing.pack(codes, lattice.bits)
    assert len(stream) == math.ceil(53 * lattice.bits / 8)
    value = sum(number << (i * lattice.bits) for i, number in enumerate(numbers(codes)))
    assert int.from_bytes(bytes(stream.tolist()), "little") == value
    assert torch.equal(packing.unpack(stream, 53, lattice.bits), codes)


# --- training and bad input


def test_straight_through() -> None:
    lattice = SphereLattice(24, 79)
    x = torch.nn.functional.normalize(drawn(50, 24), dim=1).requires_grad_()
    out = lattice.straight_through(x)
    assert torch.equal(out, lattice.decode(lattice.encode(x)))
    assert torch.allclose(out.norm(dim=1), torch.ones(50))
    weight = drawn(50, 24, 1)
    (out * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_bad_input() -> None:
    lattice = SphereLattice(8, 3)
    bad = drawn(4, 8)
    bad[2, 1] = math.nan
    for message, call in {
        "row 2 holds NaN": lambda: lattice.quantize(bad),
        r"give \(n, 8\)": lambda: lattice.quantize(drawn(4, 7)),
        "give real numbers": lambda: lattice.quantize(torch.ones(2, 8, dtype=torch.bool)),
        "give integers": lambda: lattice.rank(drawn(2, 8)),
        "row 1 is no point": lambda: lattice.rank(torch.tensor([[1] * 3 + [0] * 5, [1] * 8])),
        "row 0 is no point": lambda: lattice.rank(torch.full((1, 8), 100)),
        "row 2 is no point": lambda: lattice.rank(
            torch.tensor([[1] * 3 + [0] * 5] * 2 + [[1] * 2 + [0] * 6])
        ),
        r"uint8 \(n, 2\)": lambda: lattice.unrank(torch.zeros(3, 3, dtype=torch.uint8)),
        "no integer vector": lambda: SphereLattice(3, 7),
        "1 to 16129": lambda: SphereLattice(3, 0),
        "give fewer bits": lambda: SphereLattice(24, 2000),
        "give at least 6 bits": lambda: radius_for_bits(24, 5),
        "at least 1 bit": lambda: radius_for_bits(1, 5),
        "give 1 to 2016": lambda: E8Shell(0),
        "give at least 1": lambda: SignCode(0),
        "none of 9 bits": lambda: packing.pack(torch.zeros(3, 1, dtype=torch.uint8), 9),
        "does not hold 3": lambda: packing.unpack(torch.zeros(3, dtype=torch.uint8), 3, 9),
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
