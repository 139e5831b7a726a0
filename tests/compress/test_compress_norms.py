"""BatchNorm: folding is exact, re-estimation must earn its place."""

import copy

import pytest
import torch
from torch import nn

from remanence.compress.network.calibration import mean_kl
from remanence.compress.network.norms import fold_batch_norms, improve_norms, reestimate_norms
from remanence.errors import InputError


@pytest.mark.parametrize("variance", [1e-12, 1e-6, 1e-3, 1.0, 1e4])
def test_folding_changes_no_output(variance):
    """Trap T7: an eps that is dropped, or added outside the root, is off by far more."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5).eval()
    norm.running_var.fill_(variance)
    norm.running_mean.normal_()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(norm)
    x = torch.randn(4, 5, 3, 3) * variance**0.5 + norm.running_mean.view(1, -1, 1, 1)
    expected = copy.deepcopy(model).double()(x.double())
    assert fold_batch_norms(model) == ("0",)
    assert torch.equal(norm.running_mean, torch.zeros(5))
    assert ((norm.running_var + norm.eps - 1).abs() < 1e-6).all()
    size = max(1.0, norm.weight.abs().max().item() * x.abs().max().item())
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-6, atol=1e-6 * size)


def test_what_has_no_scale_or_no_statistics_is_not_folded():
    model = nn.Sequential(
        nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, track_running_stats=False)
    )
    assert fold_batch_norms(model) == ()


def test_a_scale_that_leaves_its_type_is_refused():
    norm = nn.BatchNorm1d(2, eps=0.0)
    norm.running_var.fill_(0)
    with pytest.raises(InputError, match=r"0: its folded scale"):
        fold_batch_norms(nn.Sequential(norm))


def test_reestimation_is_the_mean_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3, momentum=0.3)).eval()
    model[1].running_mean.fill_(9)
    batches = [torch.randn(8, 3) + shift for shift in (0.0, 2.0, 4.0)]
    state = torch.get_rng_state()
    reestimate_norms(model, batches)
    expected = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected)
    variance = torch.stack([batch.var(0) for batch in batches]).mean(0)
    torch.testing.assert_close(model[1].running_var, variance)
    assert (model.training, model[1].training, model[1].momentum) == (False, False, 0.3)
    assert torch.equal(torch.get_rng_state(), state)


def test_reestimation_is_kept_only_where_it_helps():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    batches = [torch.randn(32, 4) for _ in range(4)]
    reestimate_norms(teacher, batches)
    damaged = copy.deepcopy(teacher)
    damaged[0].bias.data += 3
    before = mean_kl(teacher, damaged, batches[3:])
    assert improve_norms(damaged, teacher, batches[:3], batches[3:])
    assert mean_kl(teacher, damaged, batches[3:]) < before / 5

    good = copy.deepcopy(teacher)
    good[3].weight.data[0, 0] += 1e-3
    state = copy.deepcopy(good.state_dict())
    assert not improve_norms(good, teacher, [torch.randn(4, 4)], batches[3:])
    assert all(torch.equal(value, state[key]) for key, value in good.state_dict().items())


def test_one_item_a_batch_is_refused_in_one_line():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(InputError, match=r"more than 1 value per channel") as refused:
        reestimate_norms(model, [torch.randn(1, 3)])
    assert "\n" not in str(refused.value)
