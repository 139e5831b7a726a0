"""Eight bytes of a SIFT descriptor (arXiv 1806.03198), beside OPQ and PCA, with margins. Slow.

50,000 descriptors to learn from, 200,000 others to search, 2,000 queries with their exact truth.
"""

from pathlib import Path

import pytest
import torch

from remanence.kit.statistics import mcnemar
from remanence.kit.vectors import open_ids, open_vectors
from remanence.search.catalyzer.linear import PcaTransform
from remanence.search.catalyzer.training import Settings, Training
from remanence.search.choice import code_for_bytes, new_catalyzer
from remanence.search.exact import exact_neighbours, recall_hits
from remanence.search.heldout import HeldOut
from remanence.search.rivals import run_rival

SIFT = Path(__file__).parents[1] / "../shared/data/sift"
CODE = code_for_bytes(8, dim=24)
RANKS = (1, 10, 100)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SIFT.exists(), reason="needs ../shared/data/sift"),
]


def rows(name):
    return torch.from_numpy(open_vectors(str(SIFT / name)).array())


def trained(learn, koleo, epochs):
    settings = Settings(koleo=koleo, epochs=epochs, pool=12_500)
    catalyzer = new_catalyzer(learn.shape[1], [CODE.dim], hidden=256, seed=0)
    list(Training(catalyzer, learn, settings, seed=0).epochs())
    return catalyzer.at(CODE.dim)


@pytest.fixture(scope="module")
def data():
    learn, base, queries = rows("learn.bvecs@0:50000"), rows("base.bvecs"), rows("query.bvecs")
    truth = open_ids(str(SIFT / "groundtruth.ivecs"), below=len(base))[:, 0]
    some = exact_neighbours(queries[:50].numpy(), base.numpy(), 1)[0][:, 0]
    gaps = [(queries[:50] - base[ids]).square().sum(1) for ids in (truth[:50], some)]
    assert torch.equal(*gaps)  # integers: exact; equally near ones may differ
    return learn, HeldOut(base, queries, truth)


@pytest.fixture(scope="module")
def hits(data):
    """For each method and R, whether the neighbour of each query is among the first R."""
    learn, held_out = data
    spread = trained(learn, 0.02, 12)
    found = {
        "spread + lattice": held_out.found(spread, CODE),
        "spread, not rounded": held_out.found(spread, None),
        "lambda 0 + lattice": held_out.found(trained(learn, 0.0, 6), CODE),
        "PCA + lattice": held_out.found(PcaTransform.fit(learn, CODE.dim), CODE),
    }
    for key in ("OPQ8_64,PQ8", "PQ8"):
        base, queries = held_out.base.numpy(), held_out.queries.numpy()
        threads = torch.get_num_threads()
        found[key] = run_rival(key, learn.numpy(), base, queries, 100, threads=threads).ids
    all_hits = {name: recall_hits(ids, held_out.truth, RANKS) for name, ids in found.items()}
    for name, by_rank in all_hits.items():
        print(f"{name}: " + ", ".join(f"@{r} {share.mean():.4f}" for r, share in by_rank.items()))
    return all_hits


@pytest.mark.parametrize("rival", ["OPQ8_64,PQ8", "PCA + lattice"])
def test_spread_vectors_find_more_than_a_trained_code(hits, rival):
    found = mcnemar(hits["spread + lattice"][10], hits[rival][10])
    low, high = found.interval
    print(f"recall@10 over {rival}: {found.difference:+.4f} ({low:+.4f} to {high:+.4f})")
    assert found.difference >= 0.03
    assert low > 0


def test_it_is_the_spreading_that_lets_them_be_rounded(hits):
    assert hits["lambda 0 + lattice"][10].mean() < 0.2
    assert hits["spread + lattice"][10].mean() > hits["spread, not rounded"][10].mean() - 0.25
