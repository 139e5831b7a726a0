"""Mining against brute force in float64: never itself, whatever the duplicates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remanence.errors import InputError
from remanence.search.catalyzer import mining
from remanence.search.catalyzer.mining import nearest_others


def drawn(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def gaps_to_others(queries: Tensor, own: Tensor, base: Tensor) -> Tensor:
    """Return all distances, from the differences in float64; infinite to itself."""
    gaps = (queries.double().unsqueeze(1) - base.double().unsqueeze(0)).norm(dim=2)
    for row, itself in enumerate(own.tolist()):
        if itself >= 0:
            gaps[row, itself] = torch.inf
    return gaps


def agrees(found: Tensor, queries: Tensor, own: Tensor, base: Tensor, k: int) -> None:
    """Compare distances, which ties leave alone."""
    gaps = gaps_to_others(queries, own, base)
    assert found.shape == (len(queries), k)
    assert found.dtype == torch.int64
    assert not (found == own.unsqueeze(1)).any()
    assert all(len(set(row)) == k for row in found.tolist())
    expected = gaps.sort(dim=1).values[:, :k]
    assert torch.allclose(gaps.gather(1, found), expected, atol=2e-3)


@pytest.mark.parametrize("nearest", [mining._nearest_on_cpu, mining._nearest_by_products])
@pytest.mark.parametrize("k", [1, 10, 499])
def test_brute_force(monkeypatch: pytest.MonkeyPatch, nearest: object, k: int) -> None:
    """Both ways, that of a GPU too."""
    monkeypatch.setattr(mining, "_nearest_on_cpu", nearest)
    monkeypatch.setattr(mining, "ROWS", 64)
    monkeypatch.setattr(mining, "TABLE", 5000)
    base = drawn(500, 8)
    own = torch.arange(3, 500, 2)
    found = nearest_others(base[own], own, base, k)
    agrees(found, base[own], own, base, k)
    exact = gaps_to_others(base[own], own, base).argsort(dim=1)[:, :k]
    assert (found == exact).float().mean() > 0.99  # and nearest first


@pytest.mark.parametrize("nearest", [mining._nearest_on_cpu, mining._nearest_by_products])
@pytest.mark.parametrize("copies", [2, 6, 40])
def test_duplicates_are_others_and_itself_is_not(
    monkeypatch: pytest.MonkeyPatch, nearest: object, copies: int
) -> None:
    """With 40 copies the search itself seldom finds the query among the first 6."""
    monkeypatch.setattr(mining, "_nearest_on_cpu", nearest)
    base = drawn(60, 4).repeat(copies, 1)
    own = torch.arange(len(base))
    found = nearest_others(base, own, base, 5)
    agrees(found, base, own, base, 5)
    twins = (found % 60 == (own % 60).unsqueeze(1)).sum(1)
    assert (twins == min(copies - 1, 5)).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 999), st.data())
def test_small_sets_full_of_ties(n: int, d: int, seed: int, data: st.DataObject) -> None:
    base = torch.randint(3, (n, d), generator=torch.Generator().manual_seed(seed)).float()
    k = data.draw(st.integers(1, n - 1))
    own = torch.tensor(data.draw(st.lists(st.integers(-1, n - 1), min_size=1, max_size=30)))
    queries = torch.where((own < 0).unsqueeze(1), torch.ones(d), base[own])
    agrees(nearest_others(queries, own, base, k), queries, own, base, k)


def test_a_query_from_elsewhere_keeps_all() -> None:
    base, queries = drawn(50, 3), drawn(20, 3, 1)
    own = torch.full((20,), -1)
    found = nearest_others(queries, own, base, 1)
    assert torch.equal(found[:, 0], torch.cdist(queries, base).argmin(1))


@pytest.mark.parametrize("nearest", [mining._nearest_on_cpu, mining._nearest_by_products])
def test_far_from_the_origin(monkeypatch: pytest.MonkeyPatch, nearest: object) -> None:
    """The products of these vectors are 10^8, and the last digits of float32 are 8 apart."""
    monkeypatch.setattr(mining, "_nearest_on_cpu", nearest)
    base = (drawn(300, 8) * 1024).round() / 1024 + 4096  # exact in float32
    own = torch.arange(300)
    found = nearest_others(base, own, base, 10)
    exact = gaps_to_others(base, own, base).argsort(dim=1)[:, :10]
    assert (found == exact).float().mean() > 0.99


def test_half_precision_and_no_queries() -> None:
    base, own = drawn(100, 8).bfloat16(), torch.arange(100)
    assert torch.equal(
        nearest_others(base, own, base, 7), nearest_others(base.float(), own, base.float(), 7)
    )
    assert nearest_others(base[:0], own[:0], base, 7).shape == (0, 7)


def test_bad_input() -> None:
    base, own = drawn(10, 3), torch.arange(10)
    broken = base.clone()
    broken[4, 1] = torch.nan
    for message, call in {
        "10 neighbours among 9 others": lambda: nearest_others(base, own, base, 10),
        "0 neighbours": lambda: nearest_others(base, own, base, 0),
        "hold NaN": lambda: nearest_others(broken, own, base, 2),
        "that hold NaN": lambda: nearest_others(base, own, broken, 2),
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
