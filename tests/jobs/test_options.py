import math

import pytest

from remanence import cli
from remanence.errors import InputError
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
