from __future__ import annotations

import copy
import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from torch import nn

from remanence.compress.layout import Layout, layout_of
from remanence.compress.modules.replace import quantised_layers, replace_layers
from remanence.compress.quantised import Quantised
from remanence.compress.storage.export import export_onnx
from remanence.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def quantise(model: nn.Module, block: int, codewords: int, keep: tuple[str, ...] = ()) -> nn.Module:
    """Random codes for every layer with a row that the block divides; the rest in float16."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    found = {}
    for path, module in model.named_modules():
        name, layout = path, layout_of(module)
        if isinstance(module, nn.MultiheadAttention):
            name, layout = f"{path}.in_proj", Layout("linear", tuple(module.in_proj_weight.shape))
        if layout is None or layout.row_length % block or name in keep:
            continue
        shape = (layout.rows, layout.row_length // block)
        codes = torch.randint(codewords, shape, generator=generator)
        scale = 2 * layout.row_length**-0.5
        codebook = (torch.randn(codewords, block, generator=generator) * scale).half().float()
        found[name] = Quantised(layout, codes, codebook)
    return replace_layers(model, found).eval()


def payload(model: nn.Module) -> int:
    """Bytes of codes, and of everything else in float16."""
    layers = quantised_layers(model).values()
    codes = sum(x.codes.numel() * (1 if len(x.codebook) <= 256 else 2) for x in layers)
    norms = sum(b.numel() for b in model.buffers() if b.is_floating_point())
    return codes + 2 * sum(p.numel() for p in model.parameters()) + 4 * norms


def run(path: Path, *inputs: torch.Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [known.name for known in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))


def agrees(model: nn.Module, path: Path, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = model(*inputs)
    assert expected.std() > 1e-3
    ours = torch.from_numpy(run(path, *inputs)[0])
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_convolutional_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantise(timm.create_model("resnet18", num_classes=10), 8, 256, keep=("conv1",))
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    size = export_onnx(model, tmp_path / "m.onnx", x)
    assert size == (tmp_path / "m.onnx").stat().st_size
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]
    # A weight written in float32 beside its codes would be 32 times over.
    assert size < payload(model) + 40_000
    agrees(model, tmp_path / "m.onnx", x)
    agrees(model, tmp_path / "m.onnx", torch.randn(3, 3, 32, 32))  # another batch
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_vision_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5
    )
    quantise(model, 4, 64)
    size = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 32, 32))
    assert size < payload(model) + 30_000
    agrees(model, tmp_path / "m.onnx", torch.randn(5, 3, 32, 32))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.up = nn.ConvTranspose1d(16, 8, 3, stride=2, groups=2, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, groups=2, dilation=2)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0]) * scale[:, None]
        y = self.grouped(torch.relu(self.up(x.transpose(1, 2))))
        return self.head(x).mean(1) + y.mean((1, 2))[:, None]


@pytest.mark.parametrize("codewords", [16, 300])  # codes of one byte and of two
def test_every_kind_of_layer(tmp_path: Path, codewords: int) -> None:
    torch.manual_seed(0)
    model = quantise(Mixed(), 4, codewords, keep=("head",))  # tied to the table
    assert set(quantised_layers(model)) >= {"table", "attention.in_proj", "up", "grouped", "head"}
    tokens, scale = torch.randint(30, (2, 7)), torch.rand(2, 1)
    export_onnx(model, tmp_path / "m.onnx", (tokens, scale))
    agrees(model, tmp_path / "m.onnx", tokens, scale)
    held = {t.name: t for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    kind = onnx.TensorProto.UINT8 if codewords <= 256 else onnx.TensorProto.UINT16
    codes = [t for name, t in held.items() if name.endswith(".codes")]
    assert {t.data_type for t in codes} == {kind}
    assert len(codes) == 5  # the tied pair once
    floats = [t for t in held.values() if t.data_type == onnx.TensorProto.FLOAT]
    assert all(onnx.numpy_helper.to_array(t).size < 16 for t in floats)


def test_a_trained_codebook_is_rounded_as_a_saved_one_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantise(nn.Sequential(nn.Linear(8, 6)), 4, 4)
    model[0].codebook.data *= 1.0001
    export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 8))
    held = {t.name: t for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    stored = onnx.numpy_helper.to_array(held["0.weight.codebook.half"])
    assert (stored == model[0].codebook.detach().half().numpy()).all()


def test_a_network_that_branches_on_its_data_is_refused(tmp_path: Path) -> None:
    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.tensor(float(torch.rand(())))

    model = quantise(nn.Sequential(Noisy(8, 6)), 4, 4)
    with pytest.raises(InputError, match="computes another function"):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 8))
    assert not list(tmp_path.iterdir())


def test_bad_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 8)
    with pytest.raises(InputError, match="compress it first"):
        export_onnx(nn.Linear(8, 6), tmp_path / "m.onnx", x)
    model = quantise(nn.Sequential(nn.Linear(8, 6)), 4, 4)
    with pytest.raises(InputError, match="make it first"):
        export_onnx(model, tmp_path / "none" / "m.onnx", x)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"remanence\[onnx\]"):
        export_onnx(model, tmp_path / "m.onnx", x)
