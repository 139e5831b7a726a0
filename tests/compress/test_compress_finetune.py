"""Codebooks are trained as the paper trains them, against the float network alone."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

from remanence.compress.layout import Layout
from remanence.compress.modules.replace import quantised_layers, replace_layers
from remanence.compress.network.calibration import mean_kl
from remanence.compress.network.finetune import finetune
from remanence.compress.network.norms import reestimate_norms
from remanence.compress.quantised import Quantised
from remanence.errors import InputError


def quantised(shape, block, codewords, generator):
    """Random codes that leave the last codeword without a block."""
    layout = Layout("linear" if len(shape) == 2 else "conv", shape)
    blocks = (layout.rows, layout.row_length // block)
    codes = torch.randint(codewords - 1, blocks, generator=generator)
    codebook = torch.randn(codewords, block, generator=generator) / 4
    return Quantised(layout, codes, codebook.half().float())


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    student = replace_layers(
        copy.deepcopy(teacher),
        {
            "0": quantised((12, 8), 4, 4, generator),
            "2": quantised((5, 12), 4, 4, generator),
        },
    )
    batches = [torch.randn(16, 8, dtype=dtype) for _ in range(4)]
    return teacher, student, batches


def test_steps_are_averaged_sgd_on_the_weights():
    """Oracle 8: the released rule, gradients averaged over a codeword's blocks, on full weights."""
    teacher, student, batches = pair(torch.float64)
    weights, velocity, codes = {}, {}, {}
    for name, layer in quantised_layers(student).items():
        weights[name] = layer.weight.detach().clone().requires_grad_()
        velocity[name] = torch.zeros_like(weights[name])
        codes[name] = layer.codes.long()
    biases = student[0].bias, student[2].bias
    trail = []

    def note(_step, _loss):
        trail.append({n: x.weight.detach().clone() for n, x in quantised_layers(student).items()})

    finetune(
        student,
        teacher,
        batches,
        holdout=batches,
        steps=20,
        lr=0.3,
        momentum=0.9,
        weight_decay=1e-2,
        schedule="constant",
        clip=math.inf,
        on_step=note,
    )
    for step in range(20):
        x = batches[step % 4]
        out = F.linear(torch.tanh(F.linear(x, weights["0"], biases[0])), weights["2"], biases[1])
        with torch.no_grad():
            p = F.softmax(teacher(x), 1)
        loss = (p * (p.log() - F.log_softmax(out, 1))).sum(1).mean()
        grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        for name, weight in weights.items():
            blocks = grads[name].reshape(-1, 4)
            flat = codes[name].flatten()
            mean = torch.stack(
                [blocks[flat == k].mean(0) if (flat == k).any() else blocks[0] for k in range(4)]
            )
            step_gradient = mean[flat].reshape(weight.shape) + 1e-2 * weight.detach()
            velocity[name] = 0.9 * velocity[name] + step_gradient
            weights[name] = (weight.detach() - 0.3 * velocity[name]).requires_grad_()
            torch.testing.assert_close(trail[step][name], weights[name], rtol=0, atol=1e-12)


def test_dead_codewords_stay_finite():
    """Trap T5: a codeword without blocks is not divided by nothing."""
    teacher, student, batches = pair()
    finetune(student, teacher, batches, holdout=batches, steps=10)
    for layer in quantised_layers(student).values():
        assert (layer.codes == 3).sum() == 0
        assert layer.codebook.isfinite().all()


@pytest.mark.parametrize(("grad", "lr"), [("mean", 0.05), ("sum", 1e-2)])
def test_training_lowers_the_divergence_and_keeps_the_best(grad, lr):
    teacher, student, batches = pair()
    holdout = [torch.randn(64, 8)]
    before = mean_kl(teacher, student, holdout)
    state = copy.deepcopy(teacher.state_dict())
    curve = finetune(
        student,
        teacher,
        batches,
        holdout=holdout,
        steps=100,
        lr=lr,
        grad=grad,
        train=("codebooks", "biases"),
        schedule="cosine",
    )
    best = min(point.holdout_kl for point in curve)
    assert curve[0].holdout_kl == pytest.approx(before)
    assert best < before / 3
    assert mean_kl(teacher, student, holdout) == pytest.approx(best)
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    for layer in quantised_layers(student).values():
        assert torch.equal(layer.codebook, layer.codebook.half().float())
        assert layer.codebook.grad is None


def test_a_run_that_only_harms_gives_back_the_start():
    teacher, student, batches = pair()
    before = copy.deepcopy(student.state_dict())
    curve = finetune(
        student, teacher, batches, holdout=batches, steps=10, lr=1e3, clip=math.inf, momentum=0.0
    )
    assert min(curve, key=lambda point: point.holdout_kl).step == 0
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_only_the_chosen_layer_moves_and_flags_are_put_back():
    teacher, student, batches = pair()
    student[0].bias.requires_grad_(requires_grad=False)
    student.train()
    before = copy.deepcopy(student.state_dict())
    finetune(student, teacher, batches, holdout=batches, steps=20, layers=["2"])
    after = student.state_dict()
    assert [k for k, v in after.items() if not torch.equal(v, before[k])] == ["2.codebook"]
    assert student.training
    assert [p.requires_grad for p in student.parameters()].count(False) == 1
    assert not student[2].codebook._backward_hooks


def test_norms_learn_each_batchs_statistics_only_where_asked():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    batches = [torch.randn(16, 8) for _ in range(4)]
    reestimate_norms(teacher, batches)
    teacher.eval()
    parts = {"0": quantised((12, 8), 4, 8, torch.Generator().manual_seed(1))}
    state = copy.deepcopy(teacher.state_dict())
    for norms_train in (False, True):
        student = replace_layers(copy.deepcopy(teacher), parts)
        finetune(student, teacher, batches, holdout=batches, steps=30, norms_train=norms_train)
        moved = not torch.equal(student[1].running_mean, teacher[1].running_mean)
        assert moved == norms_train
        assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())


def test_bad_input_is_refused_in_one_line():
    teacher, student, batches = pair()

    def refused(message, model=student, of=teacher, data=batches, **options):
        with pytest.raises(InputError, match=message) as error:
            finetune(model, of, data, holdout=batches, **{"steps": 2, **options})
        assert "\n" not in str(error.value)

    refused("no quantised layer; compress it first", model=teacher, of=student)
    refused("called 'x'", layers=["x"])
    refused("share 0.codebook", of=student)
    refused("ran out after 4 steps", data=iter(batches), steps=9)
    refused("learning rate", lr=0.0)
    refused("schedule", schedule="none")
    refused("one logit", forward=lambda net, x: net(x)[:, :1])
    refused("forward", forward=lambda _net, _x: "words")
