import pytest
import torch

from remanence.errors import InputError
from remanence.speech.cpc.loss import CPCLoss
from remanence.speech.cpc.model import CPC
from remanence.speech.cpc.training import Contrast, Schedule, cpc_losses


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden": 16, "context_layers": 1, "steps": 3, "heads": 2, "ffn": 16, "window": 20}
    return CPC(**sizes, sample_rate=8000).double().eval()


@pytest.fixture(scope="module")
def loss():
    return CPCLoss(3, 8)


def waves(seed):
    drawn = torch.randn(3, 1600, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.requires_grad_()


def drawn():
    return torch.Generator().manual_seed(7)


def test_the_past_is_predicted_from_and_the_future_is_what_is_scored(model, loss):
    past, future = waves(1), waves(2)
    losses, accuracies = cpc_losses(model, loss, past, future, drawn())
    assert losses.shape == accuracies.shape == (3,)
    got = torch.autograd.grad(losses.sum(), (past, future))

    context, _ = model.context(model.encode(past))
    predictions, z = model.predict(context[:, :17]), model.encode(future)
    # Through the predictions alone, and through positives and negatives alone.
    by_past = loss(predictions, z.detach(), drawn())[0]
    by_future = loss(predictions.detach(), z, drawn())[0]
    torch.testing.assert_close(losses, by_past)
    torch.testing.assert_close(got[0], torch.autograd.grad(by_past.sum(), past)[0])
    torch.testing.assert_close(got[1], torch.autograd.grad(by_future.sum(), future)[0])
    assert all(gradient.abs().max() > 0 for gradient in got)


def test_one_copy_is_encoded_once(model, loss, monkeypatch):
    seen = []
    encode = CPC.encode
    monkeypatch.setattr(CPC, "encode", lambda self, x: seen.append(len(x)) or encode(self, x))
    wave = waves(1)
    once = cpc_losses(model, loss, wave, wave, drawn())
    twice = cpc_losses(model, loss, wave, wave.clone(), drawn())
    as_module = Contrast(model, loss)(wave, None, drawn())
    assert seen == [3, 6, 3]
    for a, b, c in zip(once, twice, as_module, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, c)


def test_copies_that_do_not_fit(model, loss):
    with pytest.raises(InputError, match="leave the length"):
        cpc_losses(model, loss, waves(1), waves(2)[:, :-80])
    short = waves(1)[:, :240]
    with pytest.raises(InputError, match="3 frames leave nothing to predict 3 ahead from"):
        cpc_losses(model, loss, short, short)


def test_the_learning_rate():
    rising = Schedule(1e-3, ramp=4)
    assert [rising.rate(step) for step in range(6)] == pytest.approx(
        [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3]
    )
    assert Schedule(1e-3).rate(0) == 1e-3
    halved = Schedule(1.0, halve=10)
    assert [halved.rate(0, epoch) for epoch in (0, 9, 10, 25)] == [1, 1, 0.5, 0.25]
