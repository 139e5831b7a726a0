import math
import re

import pytest
import timm
import torch

from remanence import cli
from remanence.errors import InputError
from remanence.jobs.learn.classifier import classifier
from remanence.jobs.options import RANGES, check_options


@pytest.mark.parametrize("name", RANGES)
def test_values_out_of_range_are_refused(name):
    low, high = RANGES[name]
    check_options({name: low})
    check_options({name: None})
    for value in (low - 1, math.nan, high + 1):
        if value != math.inf:
            with pytest.raises(InputError, match=f"--{name.replace('_', '-')}"):
                check_options({name: value})


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.6, 0.5), (0.5, 1.1), (0.5, math.nan)])
def test_scales_out_of_range_are_refused(scale):
    with pytest.raises(InputError, match="0 < MIN <= MAX <= 1"):
        check_options({"scale": scale})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--optimizer adamx", "did you mean"),
        ("--augment garbage", "not one of timm's augmentations"),
        ("--devices 5000", "this machine has"),
        ("--lr nan", "must be at least"),
        ("--batch-size 1", "for batch norm"),
    ],
)
def test_the_command_says_so_in_one_line_and_leaves_nothing(option, message, tmp_path, capsys):
    words = f"learn classifier digits --model cifar_convnet5 --size 8 --limit 64 {option}"
    assert cli.main([*words.split(), "--out", str(tmp_path / "x")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


def test_arguments_of_the_architecture_travel_with_the_model(tmp_path):
    out = tmp_path / "run"
    classifier(
        "digits",
        out=out,
        model="regnetx_002",
        model_arg=["output_stride=16"],
        size=32,
        epochs=1,
        limit=20,
        batch_size=10,
    )
    opened = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True)
    assert opened.forward_features(torch.zeros(1, 3, 64, 64)).shape[-2:] == (4, 4)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("output_stride", "--model-arg output_stride: give NAME=VALUE"),
        ("bogus=3", "resnet18: cannot be built with {'bogus': 3}"),
    ],
)
def test_a_bad_argument_of_the_architecture_is_refused(tmp_path, word, message):
    with pytest.raises(InputError, match=re.escape(message)):
        classifier("digits", out=tmp_path / "run", model="resnet18", model_arg=[word])
    assert not list(tmp_path.iterdir())
