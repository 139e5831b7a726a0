import itertools

import pytest
import torch

from remanence.compress.layout import Layout
from remanence.compress.quantizer import block_metric, full_metric
from remanence.compress.quantizer import moments as moments_module
from remanence.compress.quantizer import rows as quantizer
from remanence.compress.quantizer.block_metric import Blocks, block_kmeans
from remanence.compress.quantizer.moments import Moments
from remanence.compress.quantizer.rows import output_error, quantize_rows
from remanence.errors import InputError

METRICS = ("plain", "shared", "block", "full")


def _inputs(n, groups, length, seed=0):
    """Correlated inputs whose channels have unlike sizes, rectified."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, length // 2, length, generator=generator, dtype=torch.float64)
    mix *= torch.linspace(0.2, 2, length)
    hidden = torch.randn(n, groups, length // 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, groups, length, generator=generator, dtype=torch.float64)
    return (torch.einsum("ngh,ghr->ngr", hidden, mix) + 0.3 * noise).relu()


def _problem(rows=24, length=24, groups=1, n=400, seed=0):
    layout = Layout("conv", (rows, length, 1), groups)
    generator = torch.Generator().manual_seed(seed + 100)
    weight = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    x = _inputs(n, groups, length, seed)
    moments = Moments(layout)
    moments.add(x)
    return weight, x, moments, layout


def _direct(rows, decoded, x, damping=0.0):
    """Damped squared error of the outputs, a row of the input at a time."""
    off = (rows - decoded.double()).reshape(x.shape[1], -1, x.shape[2])
    lost = torch.einsum("ngr,gor->ngo", x, off).square().sum().item() / len(x)
    strength = damping * x.square().mean().item()
    return lost + strength * off.square().sum().item()


def _falls(objective):
    return all(after <= before for before, after in itertools.pairwise(objective))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("groups", [1, 2])
def test_no_half_step_raises_the_objective(metric, groups):
    for seed in range(5):
        rows, _, moments, layout = _problem(groups=groups, seed=seed)
        found = quantize_rows(rows, 4, 16, moments=moments, metric=metric, layout=layout, seed=seed)
        assert len(found.objective) > 3
        assert _falls(found.objective)
        assert found.quantised.codebook.half().float().equal(found.quantised.codebook)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_last_objective_is_the_error_of_what_is_stored(groups):
    rows, x, moments, layout = _problem(groups=groups)
    found = quantize_rows(rows, 4, 16, moments=moments, metric="full", layout=layout)
    decoded = found.quantised.rows()
    wanted = _direct(rows, decoded, x, damping=1e-2)
    assert found.objective[-1] == pytest.approx(wanted, rel=1e-10)
    share = _direct(rows, decoded, x) / _direct(rows, torch.zeros_like(rows), x)
    assert found.output_error == pytest.approx(share, rel=1e-10)
    off = (rows - decoded.double()).square().sum() / rows.square().sum()
    assert found.weight_error == pytest.approx(off.item(), rel=1e-10)


def test_the_centred_error_is_that_of_centred_inputs():
    rows, x, moments, layout = _problem(groups=2)
    found = quantize_rows(rows, 4, 8, moments=moments, metric="shared", layout=layout)
    decoded = found.quantised.rows()
    centred = x - x.mean(0)
    share = _direct(rows, decoded, centred) / _direct(rows, torch.zeros_like(rows), centred)
    assert output_error(rows, decoded, moments, centred=True) == pytest.approx(share, rel=1e-9)


def test_shared_codes_are_nearest_by_the_papers_own_formula():
    rows, x, moments, layout = _problem(groups=2)
    found = quantize_rows(rows, 4, 16, moments=moments, metric="shared", layout=layout)
    stacked = x.reshape(-1, 4)
    gram = moments.shared(4)
    ridge = (quantizer.SHARED_DAMPING * gram.diagonal().mean() * len(x)).sqrt()
    # Blocks of two groups of three were summed, groups averaged.
    stacked = torch.cat([stacked / 2**0.5, ridge * torch.eye(4, dtype=torch.float64)])
    points, words = rows.reshape(-1, 4), found.quantised.codebook.double()
    distances = torch.stack([(stacked @ (points - word).T).norm(dim=0) for word in words], 1)
    assert torch.equal(distances.argmin(1), found.quantised.codes.flatten())


def test_shared_metric_is_affine_covariant_and_plain_is_not(monkeypatch):
    monkeypatch.setattr(quantizer, "SHARED_DAMPING", 0.0)
    torch.manual_seed(0)
    rows, x, moments, layout = _problem(rows=60)
    mix = torch.randn(4, 4, dtype=torch.float64)
    other = Moments(layout)
    other.add((x.reshape(-1, 4) @ mix.inverse()).reshape(x.shape))  # x -> A^-T x
    mixed = (rows.reshape(-1, 4) @ mix.T).reshape(rows.shape)  # w -> A w
    agree = {}
    for metric in ("plain", "shared"):
        one = quantize_rows(rows, 4, 16, moments=moments, metric=metric, layout=layout)
        two = quantize_rows(mixed, 4, 16, moments=other, metric=metric, layout=layout)
        agree[metric] = (one.quantised.codes == two.quantised.codes).double().mean().item()
        if metric == "shared":
            wanted = one.quantised.codebook.double() @ mix.T
            torch.testing.assert_close(two.quantised.codebook.double(), wanted, rtol=0, atol=5e-3)
    assert agree["shared"] > 0.99
    assert agree["plain"] < 0.7


def test_block_updates_are_least_squares_and_codes_nearest():
    torch.manual_seed(0)
    points = torch.randn(6, 30, 3, dtype=torch.float64)
    roots = torch.randn(6, 3, 3, dtype=torch.float64) + torch.eye(3)
    weights = torch.rand(6, 30, dtype=torch.float64)
    blocks = Blocks(points, roots.mT @ roots, weights)
    found = block_kmeans(blocks, torch.randn(5, 3, dtype=torch.float64), 200)
    assert _falls(found.objective)
    words = found.codebook.double()
    away = (points.unsqueeze(2) - words).unsqueeze(-1)  # (p, n, K, d, 1)
    distances = (roots[:, None, None] @ away).square().sum((-2, -1))
    assert torch.equal(distances.argmin(2), found.codes)
    total = (distances.amin(2) * weights).sum()
    assert found.objective[-1] == pytest.approx(total.item(), rel=1e-12)
    start = torch.randn(5, 3, dtype=torch.float64)
    updated = block_metric._update(blocks, start, found.codes)
    for k in range(5):
        place, row = (found.codes == k).nonzero(as_tuple=True)
        tall = (roots[place] * weights[place, row].sqrt()[:, None, None]).flatten(0, 1)
        aim = (roots[place] @ points[place, row, :, None]).squeeze(-1)
        aim = (aim * weights[place, row].sqrt()[:, None]).flatten()
        best = torch.linalg.lstsq(tall, aim.unsqueeze(1)).solution.flatten()
        torch.testing.assert_close(updated[k], best, rtol=0, atol=1e-9)


def test_no_single_code_can_be_bettered():
    rows, x, moments, layout = _problem(rows=6, length=12)
    found = quantize_rows(rows, 3, 8, moments=moments, metric="full", layout=layout, rounds=50)
    codes, words = found.quantised.codes, found.quantised.codebook
    best = _direct(rows, words[codes].flatten(1), x, damping=1e-2)
    for o, b, k in itertools.product(range(6), range(4), range(8)):
        other = codes.clone()
        other[o, b] = k
        assert _direct(rows, words[other].flatten(1), x, damping=1e-2) >= best - 1e-12


def test_the_codebook_update_is_least_squares(monkeypatch):
    monkeypatch.setattr(full_metric, "STEPS", 200)
    monkeypatch.setattr(full_metric, "RESIDUAL", 1e-12)
    torch.manual_seed(0)
    monkeypatch.setattr(full_metric, "round_to_float16", lambda codebook: (codebook, 0))
    rows, _, moments, _ = _problem(rows=20, length=12, groups=2)
    weights = torch.rand(20, dtype=torch.float64)
    problem, blocks = quantizer._damped(rows, moments, 3, 1e-2, weights)
    codes, words = torch.randint(5, (2, 10, 4)), torch.randn(5, 3)
    value, pull = full_metric._objective(problem, words, codes)
    got, _, gain = full_metric._least_squares(
        problem, list(problem.seconds), blocks, words, codes, pull
    )
    tall, aim = [], []
    for g, o in itertools.product(range(2), range(10)):
        root = torch.linalg.cholesky(problem.seconds[g // 2][g]).T * weights[10 * g + o].sqrt()
        choose = torch.nn.functional.one_hot(codes[g, o], 5).double()  # (m, K)
        decode = torch.einsum("bk,ij->bikj", choose, torch.eye(3).double()).reshape(12, 15)
        tall.append(root @ decode)
        aim.append(root @ rows[10 * g + o])
    wanted = torch.linalg.lstsq(torch.cat(tall), torch.cat(aim).unsqueeze(1)).solution
    torch.testing.assert_close(got, wanted.reshape(5, 3), rtol=0, atol=1e-8)
    after, _ = full_metric._objective(problem, got, codes)
    assert value - gain == pytest.approx(after, rel=1e-12)


def test_a_row_of_one_block_makes_block_and_full_one():
    rows, _, moments, layout = _problem(rows=80, length=6)
    block, full = (
        quantize_rows(rows, 6, 8, moments=moments, metric=metric, layout=layout)
        for metric in ("block", "full")
    )
    assert torch.equal(block.quantised.codes, full.quantised.codes)
    assert torch.equal(block.quantised.codebook, full.quantised.codebook)
    assert block.objective == full.objective


def test_full_never_loses_to_block_in_its_own_metric():
    for seed in range(5):
        rows, x, moments, layout = _problem(seed=seed)
        lost = {}
        for metric in ("block", "full"):
            found = quantize_rows(rows, 4, 16, moments=moments, metric=metric, layout=layout)
            lost[metric] = _direct(rows, found.quantised.rows(), x, damping=1e-2)
        assert lost["full"] < 0.9 * lost["block"]


@pytest.mark.parametrize("seed", range(3))
def test_unseen_outputs_are_kept_better_by_each_metric_in_turn(seed):
    generator = torch.Generator().manual_seed(seed)
    layout = Layout("linear", (128, 96))
    rows = torch.randn(128, 96, generator=generator)
    mix = torch.randn(24, 96, generator=generator)
    mix *= torch.rand(96, generator=generator).mul(3).exp()  # channels of unlike sizes
    hidden = torch.randn(4000, 1, 24, generator=generator)
    x = hidden @ mix + torch.randn(4000, 1, 96, generator=generator)
    moments, unseen = Moments(layout), Moments(layout)
    moments.add(x[:3000])
    unseen.add(x[3000:])
    lost = {}
    for metric in METRICS:
        found = quantize_rows(rows, 8, 64, moments=moments, metric=metric, layout=layout)
        lost[metric] = output_error(rows, found.quantised.rows(), unseen)
    assert lost["shared"] < 0.95 * lost["plain"]
    assert lost["block"] < 0.7 * lost["shared"]
    assert lost["full"] < 0.4 * lost["block"]


@pytest.mark.parametrize("metric", METRICS)
def test_few_distinct_blocks_are_kept_exactly(metric):
    torch.manual_seed(0)
    _, _, moments, layout = _problem(groups=2)
    words = torch.randn(13, 4).half().float()
    rows = words[torch.randint(13, (24, 6))].flatten(1)
    found = quantize_rows(rows, 4, 16, moments=moments, metric=metric, layout=layout)
    assert torch.equal(found.quantised.rows(), rows)
    assert found.output_error == found.weight_error == found.objective[-1] == 0
    assert found.quantised.codebook.isfinite().all()
    again = quantize_rows(
        found.quantised.rows(), 4, 13, moments=moments, metric=metric, layout=layout
    )
    assert torch.equal(again.quantised.rows(), rows)


@pytest.mark.parametrize("metric", METRICS)
def test_scaling_the_weight_scales_the_codebook_and_keeps_the_codes(metric):
    rows, _, moments, layout = _problem()
    one = quantize_rows(rows.float(), 4, 16, moments=moments, metric=metric, layout=layout)
    for power in (-20, -6, 5, 20):
        scale = 2.0**power
        two = quantize_rows(
            scale * rows.float(), 4, 16, moments=moments, metric=metric, layout=layout
        )
        assert torch.equal(one.quantised.codes, two.quantised.codes)
        torch.testing.assert_close(
            two.quantised.codebook / scale, one.quantised.codebook, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("metric", ["shared", "full"])
def test_threads_and_seeds(metric):
    torch.manual_seed(0)
    layout = Layout("conv", (64, 16, 3, 3))
    rows = torch.randn(64, 144)
    moments = Moments(layout)
    moments.add(_inputs(300, 1, 144).float())
    before, found = torch.get_num_threads(), []
    try:
        for threads, seed in ((1, 0), (2, 0), (1, 1)):
            torch.set_num_threads(threads)
            found.append(
                quantize_rows(
                    rows,
                    9,
                    32,
                    moments=moments,
                    metric=metric,
                    layout=layout,
                    rounds=1,
                    iterations=4,
                    seed=seed,
                ).quantised
            )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].codebook, found[1].codebook)
    assert not torch.equal(found[0].codes, found[2].codes)


@pytest.mark.parametrize("metric", METRICS)
def test_a_layer_without_signal_falls_back_to_its_weights_and_says_so(metric):
    rows, _, _, layout = _problem()
    dead = Moments(layout)
    dead.add(torch.zeros(10, 1, 24))
    found = quantize_rows(rows, 4, 16, moments=dead, metric=metric, layout=layout)
    assert found.no_signal
    assert found.output_error == found.weight_error
    plain = quantize_rows(rows, 4, 16, moments=None, metric="plain", layout=layout)
    assert not plain.no_signal
    assert found.weight_error < 1.1 * plain.weight_error


@pytest.mark.parametrize("metric", ["shared", "block", "full"])
def test_dead_channels_and_groups_cost_nothing(metric):
    rows, x, _, layout = _problem(groups=3)
    x[:, 0, 4:12] = 0
    x[:, 2] = 0
    moments = Moments(layout)
    moments.add(x[:7])  # and fewer rows than columns
    found = quantize_rows(
        rows.float(), 4, 16, moments=moments, metric=metric, layout=layout, damping=1e-6
    )
    assert _falls(found.objective)
    assert found.quantised.rows().isfinite().all()
    assert not found.no_signal


def test_every_group_is_measured_by_its_own_inputs():
    rows, x, moments, layout = _problem(groups=2)
    x = x * torch.tensor([10.0, 0.1]).reshape(1, 2, 1)
    moments = Moments(layout)
    moments.add(x)
    found = quantize_rows(rows, 4, 16, moments=moments, metric="block", layout=layout)
    off = (rows - found.quantised.rows().double()).square().reshape(2, -1).sum(1)
    assert off[0] < 0.8 * off[1]


@pytest.mark.parametrize("metric", METRICS)
def test_row_weights_count_as_repeats(metric):
    rows, _, moments, layout = _problem()
    weights = torch.tensor([3.0] * 4 + [0.0] * 12 + [1.0] * 8)
    options = {"metric": metric, "row_weights": weights}
    init = rows[:4].reshape(-1, 4)[:8]
    weighted = quantize_rows(rows, 4, 8, moments=moments, layout=layout, init=init, **options)
    kept = torch.cat([rows[:4]] * 3 + [rows[16:]])
    short = Layout("conv", (len(kept), 24, 1))
    moments.layout = short
    repeated = quantize_rows(kept, 4, 8, moments=moments, layout=short, init=init, metric=metric)
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-9)
    assert torch.equal(weighted.quantised.codes[:4], repeated.quantised.codes[:4])


def test_a_long_row_is_searched_in_pieces(monkeypatch):
    monkeypatch.setattr(moments_module, "LONGEST", 16)
    monkeypatch.setattr(moments_module, "PIECE", 16)
    monkeypatch.setattr(full_metric, "PANEL", 8)
    monkeypatch.setattr(full_metric, "ROWS", 10)
    rows, x, _, layout = _problem(length=40)
    moments = Moments(layout, block=4)
    moments.add(x)
    found = quantize_rows(rows, 4, 16, moments=moments, metric="full", layout=layout)
    assert _falls(found.objective)
    decoded = found.quantised.rows()
    strength = 1e-2 * x.square().mean() * (rows - decoded.double()).square().sum()
    parts = [_direct(rows[:, p], decoded[:, p], x[..., p]) for p in moments.pieces]
    assert found.objective[-1] == pytest.approx(sum(parts) + strength.item(), rel=1e-10)


def test_panels_and_row_chunks_change_nothing(monkeypatch):
    rows, _, moments, layout = _problem(groups=2)
    options = {"moments": moments, "metric": "full", "layout": layout}
    whole = quantize_rows(rows, 4, 16, **options)
    monkeypatch.setattr(full_metric, "PANEL", 8)
    monkeypatch.setattr(full_metric, "ROWS", 5)
    parts = quantize_rows(rows, 4, 16, **options)
    assert torch.equal(whole.quantised.codes, parts.quantised.codes)


@pytest.mark.parametrize(
    "layout",
    [
        Layout("conv_transpose", (12, 4, 3, 3), 2),
        Layout("embedding", (40, 12)),
        Layout("conv", (40, 1, 3, 3), 40),
    ],
)
def test_every_kind_of_layer_decodes_to_its_shape(layout):
    torch.manual_seed(0)
    weight = torch.randn(layout.shape)
    block = 3
    found = quantize_rows(
        layout.to_rows(weight),
        block,
        16,
        moments=Moments.identity(layout),
        metric="full",
        layout=layout,
    )
    assert found.quantised.weight().shape == weight.shape
    assert found.quantised.codes.shape == (layout.rows, layout.row_length // block)
    assert 0 < found.output_error < 0.6


def test_one_codeword_is_the_mean_and_an_offset_is_no_matter():
    rows, _, moments, layout = _problem()
    one = quantize_rows(rows, 4, 1, moments=moments, metric="plain", layout=layout)
    mean = rows.reshape(-1, 4).mean(0, keepdim=True)
    torch.testing.assert_close(one.quantised.codebook.double(), mean, rtol=1e-3, atol=1e-4)
    far = (rows * 0.05 + 5).float()
    lost = {}
    for metric in METRICS:
        found = quantize_rows(far, 4, 32, moments=moments, metric=metric, layout=layout)
        lost[metric] = found.output_error
        assert _falls(found.objective)
    assert lost["full"] < lost["block"]


def test_bad_input_is_refused_in_one_line():
    rows, _, moments, layout = _problem()
    good = {"moments": moments, "metric": "full", "layout": layout}
    for message, change in {
        "blocks of 5": {"block": 5},
        "codewords": {"codewords": 0},
        "unknown": {"metric": "best"},
        "damping": {"damping": 0.0},
        "needs moments": {"moments": None},
        "NaN": {"rows": rows / 0},
        "rows of shape": {"rows": rows[:3]},
        "row weights": {"row_weights": torch.ones(3)},
        "another layout": {"moments": Moments.identity(Layout("linear", (24, 24)))},
    }.items():
        given = {"rows": rows, "block": 4, "codewords": 16, **good, **change}
        with pytest.raises(InputError, match=message):
            quantize_rows(given.pop("rows"), given.pop("block"), given.pop("codewords"), **given)
