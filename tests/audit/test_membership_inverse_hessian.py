import numpy as np
import pytest
import torch
from torch import Tensor, nn

from remanence.audit.membership.inverse_hessian import conjugate_gradients, inverse_hessian_attack
from remanence.errors import InputError

ETA, MU = 0.1, 0.9


def linear(d: int, outputs: int = 1, seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(d, outputs, bias=False, dtype=torch.float64).eval()
    with torch.no_grad():
        model.weight.copy_(torch.randn(outputs, d, generator=generator))
    return model


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def square_or_linear(output: Tensor, target: Tensor) -> Tensor:
    """Squared error where the flag is 0; linear in the parameters where it is 1."""
    out, (y, flag) = output[:, 0], target.T
    return torch.where(flag == 1, out + y, (out - y).square() / 2)


@pytest.mark.parametrize("max_exact", [10_000, 0])
def test_score_is_the_log_ratio_of_two_stationary_laws(max_exact: int) -> None:
    rng = np.random.default_rng(0)
    n, d, m = 30, 4, 12
    a, y = rng.normal(size=(n, d)), rng.normal(size=n)
    g, b = rng.normal(size=(m, d)), rng.normal(size=m)
    model = linear(d)
    theta = model.weight[0].detach().numpy()

    # By hand: two minima, one precision, and the difference of the two minimal values.
    hessian = a.T @ a / n
    best0 = np.linalg.solve(hessian, a.T @ y / n)

    def loss0(t: np.ndarray) -> float:
        return float(((a @ t - y) ** 2).mean() / 2)

    precision = 2 * np.eye(d) - ETA * hessian / (1 + MU)
    expected = []
    for gi, bi in zip(g, b, strict=True):
        best1 = best0 - np.linalg.solve(hessian, gi) / n
        far, near = theta - best0, theta - best1
        log_ratio = (far @ precision @ far - near @ precision @ near) / 2
        gap = loss0(best1) + (gi @ best1 + bi) / n - loss0(best0)
        expected.append(n * log_ratio / ETA + n * gap / (1 + MU))

    training = (torch.from_numpy(a), torch.stack([torch.from_numpy(y), torch.zeros(n)], 1))
    samples = (torch.from_numpy(g), torch.stack([torch.from_numpy(b), torch.ones(m)], 1))
    scores = inverse_hessian_attack(
        model,
        [tuple(part[:17] for part in training), tuple(part[17:] for part in training)],
        [tuple(part[:5] for part in samples), tuple(part[5:] for part in samples)],
        np.zeros(m, dtype=bool),
        learning_rate=ETA,
        momentum=MU,
        damping=0.0,
        loss=square_or_linear,
        max_exact=max_exact,
        tolerance=1e-12,
    )
    assert relative(scores, np.array(expected)) < 1e-9


@pytest.mark.parametrize("max_exact", [10_000, 0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_logistic_regression_matches_numpy(weight_decay: float, max_exact: int) -> None:
    rng = np.random.default_rng(1)
    n, d = 40, 5
    x, y = rng.normal(size=(n + 20, d)), rng.integers(2, size=n + 20)
    model = linear(d)
    p = 1 / (1 + np.exp(-x @ model.weight[0].detach().numpy()))
    gradients = (p - y)[:, None] * x
    own = slice(0, n)
    hessian = (x[own] * (p * (1 - p))[own, None]).T @ x[own] / n
    inverse = np.linalg.inv(hessian + (weight_decay + 0.2) * np.eye(d))
    expected = []
    for i in range(n + 20):
        others = np.delete(gradients[own], i, axis=0) if i < n else gradients[own]
        u, far = inverse @ gradients[i], inverse @ others.mean(axis=0)
        loss = -np.log(p[i] if y[i] else 1 - p[i])
        i2, i3 = u @ u / n, 2 * far @ u
        i4, i5 = u @ inverse @ u / n, 2 * far @ inverse @ u
        scale = 1 - ETA * weight_decay / (1 + MU)
        expected.append(loss / (1 + MU) - scale * (i2 + i3) / ETA - weight_decay * (i4 + i5) / ETA)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    scores = inverse_hessian_attack(
        model,
        [(inputs[:n], labels[:n])],
        [(inputs[:33], labels[:33]), (inputs[33:], labels[33:])],
        np.arange(n + 20) < n,
        learning_rate=ETA,
        momentum=MU,
        weight_decay=weight_decay,
        max_exact=max_exact,
        tolerance=1e-11,
    )
    assert scores.shape == (n + 20,)
    assert relative(scores, np.array(expected)) < 1e-9


def test_conjugate_gradients_agree_with_the_exact_solve_on_a_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:30]), y[:30]).backward()
        optimizer.step()
    model.eval()
    member = np.arange(40) < 30
    exact, iterated, head = (
        inverse_hessian_attack(
            model,
            [(x[:30], y[:30])],
            [(x, y)],
            member,
            learning_rate=0.1,
            tolerance=1e-10,
            **options,
        )
        for options in (
            {},
            {"max_exact": 1},
            {"parameters": lambda name: name.startswith("3.")},
        )
    )
    assert relative(iterated, exact) < 1e-7
    for scores in (exact, head):
        assert np.mean(scores[member][:, None] > scores[~member]) > 0.9


def test_conjugate_gradients_solve_many_rows_of_different_difficulty() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(20, 20))
    matrix = torch.from_numpy(root @ root.T + np.eye(20))
    vectors = torch.linalg.eigh(matrix).eigenvectors
    right = torch.cat([vectors.T[:1], torch.zeros(1, 20), torch.from_numpy(root[:3])])
    x = conjugate_gradients(lambda rows: rows @ matrix, right, 1e-10, 100)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, right.T).T, rtol=0, atol=1e-7)
    with pytest.raises(InputError, match="not positive definite: raise damping"):
        conjugate_gradients(lambda rows: -rows, right, 1e-10, 100)
    with pytest.raises(InputError, match="not converged in 2"):
        conjugate_gradients(lambda rows: rows @ matrix, right, 1e-10, 2)


def test_bad_input_names_the_mend() -> None:
    model = linear(4, 3)
    batch = (torch.rand(6, 4, dtype=torch.float64), torch.arange(6) % 3)
    inside = np.ones(6, dtype=bool)
    with pytest.raises(InputError, match="give a list or a DataLoader"):
        inverse_hessian_attack(model, iter([batch]), [batch], inside, learning_rate=0.1)
    with pytest.raises(InputError, match=r"give \(M,\) bool"):
        inverse_hessian_attack(model, [batch], [batch], inside.astype(int), learning_rate=0.1)
    for n in (5, 7):
        with pytest.raises(InputError, match="give one each"):
            inverse_hessian_attack(
                model, [batch], [batch], np.ones(n, dtype=bool), learning_rate=0.1
            )
    with pytest.raises(InputError, match="not positive definite"):
        inverse_hessian_attack(model, [batch], [batch], inside, learning_rate=0.1, damping=-0.1)
    with pytest.raises(InputError, match="learning_rate 0 is not positive"):
        inverse_hessian_attack(model, [batch], [batch], inside, learning_rate=0)
