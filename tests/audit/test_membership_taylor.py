import copy
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from remanence.audit.membership.loss_vector import cross_entropy
from remanence.audit.membership.taylor import LineageWarning, Posterior, lineage, matt
from remanence.errors import InputError


class Mean(nn.Module):
    """The Gaussian world: one parameter vector, loss |theta - z|^2 / 2."""

    def __init__(self, centre: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(centre.clone())

    def forward(self, z: Tensor) -> Tensor:
        return self.theta.expand(len(z), -1)


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(dim=1) / 2


def log_normal(x: Tensor, mean: Tensor, variance: float) -> Tensor:
    return torch.distributions.Normal(mean, variance**0.5).log_prob(x).sum(dim=-1)


def drifted(model: nn.Module, scale: float = 0.01, seed: int = 1) -> nn.Module:
    """A descendant of the model: every parameter moved a little."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=scale)
    return other


def explicit(model: nn.Module, reference: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    """MATT with one backward pass per sample."""
    scores = []
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(reference(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        pairs = zip(model.parameters(), reference.parameters(), gradients, strict=True)
        scores.append(-sum(((a - b) * g).sum().item() for a, b, g in pairs))
    return np.array(scores)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_order_2_is_the_exact_log_ratio_of_the_gaussian_world(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    k, d = 7, 5
    theta, z = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (1, 40))
    training = torch.randn(k, d, generator=generator, dtype=torch.float64)
    mu0 = training.mean(dim=0)
    exact = log_normal(theta, (k * mu0 + z) / (k + 1), temperature / (k + 1))
    exact -= log_normal(theta, mu0, temperature / k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LineageWarning)
        scores = {
            order: matt(
                Mean(theta[0]).eval(),
                Mean(mu0).state_dict(),
                [(z[:33], z[:33]), (z[33:], z[33:])],
                loss=squared,
                order=order,
                temperature=temperature,
                training_batches=[(training, training)],
                damping=1.0,  # the curvature of the candidate itself: H = (k + 1) I
            )
            for order in (1, 2)
        }
    assert np.std(scores[2] - exact.numpy()) < 1e-10
    assert np.std(scores[1] - exact.numpy()) > 1e-2


def ship_or_truck(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = nn.functional.normalize(torch.randn(60, 8, generator=generator, dtype=torch.float64))
    return torch.cat([x, torch.ones(60, 1)], dim=1), torch.randint(2, (60,), generator=generator)


def logistic(seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(9, 1, bias=False, dtype=torch.float64).eval()
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 9, generator=generator))
    return model


@pytest.mark.filterwarnings("ignore::remanence.audit.membership.taylor.LineageWarning")
def test_logistic_regression_has_the_closed_form() -> None:
    x, y = ship_or_truck()
    model, reference = logistic(1), logistic(2)
    theta, theta0 = model.weight[0].detach(), reference.weight[0].detach()
    sign = 2.0 * y - 1
    gradients = -(torch.sigmoid(-sign * (x @ theta0)) * sign)[:, None] * x
    scores = matt(model, reference.state_dict(), [(x, y)])
    assert relative(scores, (-gradients @ (theta - theta0)).numpy()) < 1e-12


@pytest.mark.filterwarnings("ignore::remanence.audit.membership.taylor.LineageWarning")
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("posterior", ["boltzmann", "isotropic", "diag"])
def test_every_posterior_is_a_log_ratio_of_two_gaussians(posterior: Posterior, order: int) -> None:
    x, y = ship_or_truck()
    model, reference = logistic(1), logistic(2)
    theta, theta0 = (m.weight[0].detach().numpy() for m in (model, reference))
    p = torch.sigmoid(x @ reference.weight[0]).detach().numpy()
    rows = x.numpy()
    hessian = (rows * (p * (1 - p))[:, None]).T @ rows + 0.3 * np.eye(9)
    precision = {
        "boltzmann": hessian,
        "isotropic": np.eye(9),
        "diag": np.diag(np.diag(hessian)),
    }[posterior] / 2.0
    shift = np.linalg.inv(hessian) @ ((p - y.numpy())[:, None] * rows).T  # (P, N)
    far, near = (theta - theta0)[:, None] + shift, (theta - theta0)[:, None]
    exact = -(np.sum(far * (precision @ far), 0) - np.sum(near * (precision @ near), 0)) / 2
    if order == 1:
        exact += np.sum(shift * (precision @ shift), 0) / 2
    scores = matt(
        model,
        reference.state_dict(),
        [(x[:7], y[:7]), (x[7:], y[7:])],
        order=order,  # type: ignore[arg-type]  # parametrised
        posterior=posterior,
        temperature=2.0,
        training_batches=[(x[:50], y[:50]), (x[50:], y[50:])],
        damping=0.3,
    )
    assert relative(scores, exact) < 1e-10


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).double()
    model(torch.rand(32, 3, 8, 8, dtype=torch.float64))  # fills the running statistics
    return model.eval()


def test_cnn_with_batchnorm_matches_gradients_per_sample() -> None:
    reference = small_cnn()
    model = drifted(reference)
    model[1].running_mean += 5.0  # the buffers are the reference's, not the audited model's
    x, y = torch.rand(9, 3, 8, 8, dtype=torch.float64), torch.arange(9)
    scores = matt(model, reference.state_dict(), [(x[:4], y[:4]), (x[4:], y[4:])])
    assert scores.dtype == np.float64
    assert relative(scores, explicit(model, reference, x, y)) < 1e-9


def test_vit_matches_gradients_per_sample() -> None:
    reference = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10
    )
    reference = reference.double().eval()
    nn.init.normal_(reference.head.weight, std=0.1)
    model = drifted(reference, 0.001)
    x, y = torch.rand(5, 3, 32, 32, dtype=torch.float64), torch.arange(5)
    scores = matt(model, reference.state_dict(), [(x, y)])
    assert relative(scores, explicit(model, reference, x, y)) < 1e-9


def test_members_of_a_fine_tuning_score_higher() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 30, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (200,), generator=generator)
    reference = nn.Linear(30, 2, dtype=torch.float64).eval()
    model = copy.deepcopy(reference)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:100]), y[:100]).backward()
        optimizer.step()
    scores = matt(model, reference.state_dict(), [(x, y)])
    assert np.mean(scores[:100, None] > scores[None, 100:]) > 0.6


def test_several_references_are_averaged_and_parameters_can_be_chosen() -> None:
    base = small_cnn()
    first, second = drifted(base, seed=2), drifted(base, seed=3)
    model, centre = drifted(base, seed=1), copy.deepcopy(base)
    with torch.no_grad():
        for mean, a, b in zip(*(m.parameters() for m in (centre, first, second)), strict=True):
            mean.copy_((a + b) / 2)
    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.arange(6)
    states = [first.state_dict(), second.state_dict()]
    assert relative(matt(model, states, [(x, y)]), explicit(model, centre, x, y)) < 1e-9

    head = copy.deepcopy(centre)
    head[5].load_state_dict(model[5].state_dict())
    scores = matt(model, states, [(x, y)], parameters=lambda name: name.startswith("5."))
    assert relative(scores, explicit(head, centre, x, y)) < 1e-9


def test_an_unrelated_reference_warns() -> None:
    def mlp(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)).eval()

    model, x, y = mlp(0), torch.rand(4, 20), torch.tensor([0, 1, 2, 0])
    with pytest.warns(LineageWarning, match="same initialisation"):
        matt(model, mlp(1).state_dict(), [(x, y)])
    assert not lineage(model, [mlp(1).state_dict(), mlp(2).state_dict()]).shared
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matt(model, drifted(model).state_dict(), [(x, y)])
    siblings = [drifted(model, seed=s).state_dict() for s in (2, 3)]
    family = lineage(drifted(model, seed=1), siblings)
    assert family.half_cosine == pytest.approx(0.5, abs=0.1)
    assert family.shared
    # References that lie far out on opposite sides: what differs is they, not the model.
    with torch.no_grad():
        opposite = [
            {n: v + s * 0.5 * torch.sign(v) for n, v in model.state_dict().items()} for s in (1, -1)
        ]
    assert lineage(model, opposite).half_cosine == pytest.approx(-1.0, abs=0.01)


def test_bad_input_names_the_mend() -> None:
    model = nn.Linear(4, 3, dtype=torch.float64).eval()
    batch = (torch.rand(5, 4, dtype=torch.float64), torch.arange(5) % 3)
    state = model.state_dict()
    hessian = {"training_batches": [batch], "damping": 1.0}
    broken = batch[0].clone()
    broken[2] = torch.nan
    with pytest.raises(InputError, match="lacks weight"):
        matt(model, {"bias": state["bias"]}, [batch])
    with pytest.raises(InputError, match=r"weight is \(3, 5\)"):
        matt(model, {**state, "weight": torch.zeros(3, 5)}, [batch])
    with pytest.raises(InputError, match=r"lacks the reference's head\.weight"):
        matt(model, {**state, "head.weight": torch.zeros(3)}, [batch])
    with pytest.raises(InputError, match=r"call model\.eval"):
        matt(copy.deepcopy(model).train(), state, [batch])
    with pytest.raises(InputError, match="training_batches and damping"):
        matt(model, state, [batch], order=2)
    with pytest.raises(InputError, match="too many"):
        matt(model, state, [batch], order=2, **hessian, max_parameters=9)
    # The Hessian of cross entropy is singular along a shift of all the logits.
    with pytest.raises(InputError, match="not positive definite"):
        matt(model, state, [batch], order=2, **{**hessian, "damping": -1e-3})
    with pytest.raises(InputError, match="without reduction"):
        matt(model, state, [batch], loss=nn.functional.cross_entropy)
    with pytest.raises(InputError, match="at least one batch"):
        matt(model, state, [])
    with pytest.raises(InputError, match="sample 2 is not finite"):
        matt(drifted(model), state, [(broken, batch[1])])


def test_cross_entropy_takes_one_logit_or_many() -> None:
    logits, labels = torch.randn(6), torch.tensor([0, 1, 1, 0, 1, 0])
    two = torch.stack([torch.zeros(6), logits], dim=1)
    for one in (logits, logits[:, None]):
        torch.testing.assert_close(cross_entropy(one, labels), cross_entropy(two, labels))
