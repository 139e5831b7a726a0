"""What only a GPU shows; skipped where there is none."""

import pytest
import torch

from remanence.jobs.learn.classifier import classifier
from remanence.jobs.learn.fixres import fixres
from remanence.kit.architectures import CifarConvNet
from remanence.learn.fixres import recalibrate_bn_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_training_and_fixres_run_in_bf16(tmp_path):
    trained = classifier(
        "digits", out=tmp_path / "base", model="cifar_convnet5", size=16, epochs=6, flip=0.0
    )
    assert trained.accuracy > 0.8
    fixed = fixres(
        "digits",
        model=[str(tmp_path / "base/model")],
        out=tmp_path / "fixed",
        scope=["classifier+last_bn", "bn_stats", "classifier", "equalize"],
        tune_sizes=[16, 20],
        epochs=1,
        flip=0.0,
    )
    assert fixed.results["comparison"]["accuracy"] > 0.8


def test_exact_statistics_agree_with_the_cpu():
    torch.manual_seed(0)
    batches = [torch.randn(n, 3, 16, 16) for n in (5, 8, 3)]
    models = [CifarConvNet().eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    recalibrate_bn_(models[0], batches)
    recalibrate_bn_(models[1].cuda(), [batch.cuda() for batch in batches])
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name].cpu(), tensor, msg=name)
