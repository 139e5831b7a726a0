from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from remanence.compress.modules.replace import quantised_layers
from remanence.compress.storage.importers import import_bgd, import_pqf
from remanence.errors import InputError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 16, 1, bias=False)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv3(torch.relu(self.bn2(self.conv2(x)))))
        return self.fc(x.mean((2, 3)))


# Layer -> block size, codewords.
QUANTISED = {"conv2": (18, 16), "conv3": (4, 8), "fc": (4, 300)}


def decoded(codes: torch.Tensor, codebook: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The definition: block b of row o is codeword codes[o, b]."""
    weight = torch.empty(shape).flatten(1)
    block = codebook.shape[1]
    for o in range(codes.shape[0]):
        for b in range(codes.shape[1]):
            weight[o, b * block : (b + 1) * block] = codebook[codes[o, b]].float()
    return weight.reshape(shape)


def teacher() -> tuple[Net, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A network whose quantised weights are exactly codes and codebooks."""
    torch.manual_seed(0)
    net, parts = Net().eval(), {}
    for norm in (net.bn1, net.bn2):
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3)
    for name, (block, codewords) in QUANTISED.items():
        module = net.get_submodule(name)
        shape = (len(module.weight), module.weight[0].numel() // block)
        codes = torch.randint(codewords, shape)
        codebook = (torch.randn(codewords, block) / 4).half()
        module.weight.data.copy_(decoded(codes, codebook, module.weight.shape))
        parts[name] = (codes, codebook)
    return net, parts


def fold(norm: nn.BatchNorm2d) -> dict[str, torch.Tensor]:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return {"weight": scale.detach(), "bias": (norm.bias - norm.running_mean * scale).detach()}


def bgd_state(*, folded: bool) -> tuple[Net, dict[str, Any]]:
    net, parts = teacher()
    state: dict[str, Any] = {}
    for name, (codes, codebook) in parts.items():
        state[name] = {
            "centroids": codebook,
            # Block-major: all rows of the first block, then all rows of the second.
            "assignments": torch.tensor(
                [codes[o, b] for b in range(codes.shape[1]) for o in range(codes.shape[0])],
                dtype=torch.int16 if name == "fc" else torch.uint8,
            ),
            "n_blocks": codes.shape[1],
            "is_conv": name != "fc",
            "k": 3 if name == "conv2" else 1,
        }
    state["conv1"] = {"weight": net.conv1.weight.detach()}
    for name in ("bn1", "bn2"):
        norm = net.get_submodule(name)
        state[name] = fold(norm) if folded else dict(norm.state_dict())
    state["fc_bias"] = {"bias": net.fc.bias}
    return net, state


def pqf_state(*, folded: bool) -> tuple[Net, dict[str, Any]]:
    net, parts = teacher()
    state: dict[str, Any] = dict(net.state_dict())
    for name, (codes, codebook) in parts.items():
        del state[f"{name}.weight"]
        dtype = torch.uint8 if len(codebook) <= 256 else torch.int16
        state |= {f"{name}.codes_matrix": codes.to(dtype), f"{name}.codebook": codebook}
    if folded:
        for name in ("bn1", "bn2"):
            for key in ("running_mean", "running_var", "num_batches_tracked"):
                del state[f"{name}.{key}"]
            state |= {f"{name}.{k}": v for k, v in fold(net.get_submodule(name)).items()}
    return net, state


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(
    ("make", "read"), [(bgd_state, import_bgd), (pqf_state, import_pqf)], ids=["bgd", "pqf"]
)
def test_outputs_are_those_of_the_network_that_was_saved(
    make: Any, read: Any, folded: bool
) -> None:
    # With the statistics dropped (or the folded norms read with fresh ones and eps) this fails.
    net, state = make(folded=folded)
    fresh = Net().eval()
    before = copy.deepcopy(fresh.state_dict())
    model = read(state, fresh)
    assert set(quantised_layers(model)) == set(QUANTISED)
    for name in QUANTISED:
        assert torch.equal(model.get_submodule(name).weight, net.get_submodule(name).weight)
    x = torch.randn(4, 3, 9, 9)
    torch.testing.assert_close(model(x), net(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in before.items())
    assert model.bn1.eps == 1e-5


def test_codes_that_wrapped_in_16_bits_are_put_right() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(2, 40_000, bias=False))
    codebook = torch.randn(65_536, 2).half()
    codes = torch.randint(65_536, (40_000, 1))
    model = import_pqf({"0.codes_matrix": codes.short(), "0.codebook": codebook}, layer)
    assert torch.equal(model[0].weight, codebook.float()[codes[:, 0]])


def test_transposed_convolution_is_decoded_as_it_was_coded() -> None:
    torch.manual_seed(0)
    codes, codebook = torch.randint(8, (6, 4)), torch.randn(8, 4).half()
    net = nn.Sequential(nn.ConvTranspose2d(6, 4, 2, bias=False))
    state = {"0.codes_matrix": codes.byte(), "0.codebook": codebook}
    model = import_pqf(state, net)
    assert type(model[0]) is nn.ConvTranspose2d
    assert torch.equal(model[0].weight, decoded(codes, codebook, net[0].weight.shape))


def test_unknown_and_missing_names_are_told() -> None:
    for make, read in ((bgd_state, import_bgd), (pqf_state, import_pqf)):
        _, state = make(folded=True)
        entry = state.get("conv1", state.get("conv1.weight"))
        with pytest.raises(InputError, match=r"stem\S* is in the checkpoint but not"):
            read(state | {"stem" if make is bgd_state else "stem.weight": entry}, Net())
        for key in ("conv1", "conv1.weight"):
            state.pop(key, None)
        with pytest.raises(InputError, match=r"conv1\.weight is in the network but not"):
            read(state, Net())


def test_half_of_the_statistics_is_refused() -> None:
    _, state = pqf_state(folded=False)
    del state["bn2.running_var"]
    with pytest.raises(InputError, match=r"bn2\.running_var is in the network but not"):
        import_pqf(state, Net())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"assignments": torch.zeros(11, dtype=torch.uint8)}, "do not fill 12 rows of 4 blocks"),
        ({"assignments": torch.full((48,), 16, dtype=torch.uint8)}, "outside the 16 codewords"),
        ({"centroids": torch.full((16, 18), torch.nan)}, "NaN"),
        ({"centroids": torch.zeros(16, 7)}, "cannot be cut into blocks of 7"),
        ({"centroids": torch.zeros(512, 18)}, "wrapped around"),
        ({"centroids": torch.zeros(16)}, "not \\(K, d\\)"),
    ],
)
def test_damaged_layers(change: dict[str, torch.Tensor], message: str) -> None:
    _, state = bgd_state(folded=True)
    state["conv2"] |= change
    with pytest.raises(InputError, match=message):
        import_bgd(state, Net())


def test_other_kinds_of_files() -> None:
    net, bgd = bgd_state(folded=True)
    with pytest.raises(InputError, match="try import_bgd"):
        import_pqf(bgd, Net())
    with pytest.raises(InputError, match="try import_pqf"):
        import_bgd(net.state_dict(), Net())
    with pytest.raises(InputError, match="not a checkpoint"):
        import_bgd({}, Net())
    with pytest.raises(InputError, match="but a ReLU in the network"):
        import_bgd({"0": bgd["conv2"]}, nn.Sequential(nn.ReLU()))
    _, pqf = pqf_state(folded=True)
    del pqf["fc.codebook"]
    with pytest.raises(InputError, match="no codebook"):
        import_pqf(pqf, Net())
