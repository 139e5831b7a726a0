"""Re-estimated statistics against torch.var over all inputs at once, and a naive sequential run."""

import copy
import itertools
import threading
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.learn.fixres.batchnorm import recalibrate_bn_

STATISTICS = ("running_mean", "running_var")


class Net(nn.Module):
    """Two parallel norms, a sum, a third norm, a head; activations far from zero mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left_bn = nn.BatchNorm2d(6)
        self.right = nn.Conv2d(3, 6, 1)
        self.right_bn = nn.BatchNorm2d(6, affine=False)
        self.conv = nn.Conv2d(6, 5, 3, stride=2)
        self.bn = nn.BatchNorm2d(5, momentum=None)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.left_bn(self.stem(x)).relu_() + self.right_bn(self.right(x))
        out: Tensor = self.fc(self.bn(self.conv(y)).relu().mean((2, 3)))
        return out


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().train()


def images(n: int = 11, side: int = 12, seed: int = 1) -> Tensor:
    return 3 + 2 * torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def population(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Brute force: the norm's whole input at once, in float64."""
    inputs: list[Tensor] = []
    norm = model.get_submodule(name)
    handle = norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        copy_mode = [m.training for m in model.modules()]
        model.eval()(x)
        for module, mode in zip(model.modules(), copy_mode, strict=True):
            module.training = mode
    handle.remove()
    flat = torch.cat(inputs).double().transpose(0, 1).flatten(1)
    return flat.mean(1), torch.var(flat, dim=1, correction=1)


def near(actual: object, expected: Tensor) -> None:
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [*range(1, 12)])
def test_last_norm_is_the_population_whatever_the_batches(net: Net, size: int) -> None:
    x = images()
    mean, var = population(net, "bn", x)
    before = copy.deepcopy(net.state_dict())
    assert recalibrate_bn_(net, iter(torch.split(x, size))) == ["bn"]
    near(net.bn.running_mean, mean)
    near(net.bn.running_var, var)
    moved = {f"bn.{s}" for s in STATISTICS}
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in moved), name
    assert all(module.training for module in net.modules())


def test_running_twice_changes_nothing_more(net: Net) -> None:
    batches = torch.split(images(), 4)
    recalibrate_bn_(net, batches, "all")
    once = copy.deepcopy(net.state_dict())
    recalibrate_bn_(net, batches, "all")
    assert all(torch.equal(t, once[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize("size", [1, 3, 11])
def test_all_norms_are_final_in_order_of_execution(net: Net, size: int) -> None:
    x = images()
    naive = copy.deepcopy(net)
    for name in ("left_bn", "right_bn", "bn"):  # one at a time, on final predecessors
        mean, var = population(naive, name, x)
        norm = naive.get_submodule(name)
        norm.load_state_dict({**norm.state_dict(), "running_mean": mean, "running_var": var})
    passes = itertools.count()

    class Counted(list[Tensor]):
        def __iter__(self):  # type: ignore[no-untyped-def]  # the list's own iterator
            next(passes)
            return super().__iter__()

    assert recalibrate_bn_(net, Counted(torch.split(x, size)), "all") == [
        "left_bn",
        "right_bn",
        "bn",
    ]
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, naive.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert next(passes) == 1 + 2  # a look at the first batch; the parallel norms share a pass
    for name in ("left_bn", "right_bn", "bn"):
        mean, var = population(net, name, x)
        near(net.get_submodule(name).running_mean, mean)
        near(net.get_submodule(name).running_var, var)


def test_all_of_a_resnet_is_self_consistent() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    x = images(6, 32)
    names = recalibrate_bn_(model, torch.split(x, 4), "all")
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(names) == sorted(norms)
    for name in names:
        mean, var = population(model, name, x)
        near(model.get_submodule(name).running_mean, mean)
        near(model.get_submodule(name).running_var, var)


def test_a_large_offset_does_not_cancel() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    x = 1000 + 0.1 * images(64, 4)  # float32 sums of squares would keep no digit of the variance
    recalibrate_bn_(model, torch.split(x, 5))
    near(model[0].running_var, torch.var(x.double().transpose(0, 1).flatten(1), dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_accumulate_in_float64(net: Net, dtype: torch.dtype) -> None:
    x = images(64)
    inputs: list[Tensor] = []
    handle = net.bn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.autocast("cpu", dtype=dtype):
        recalibrate_bn_(net, list(torch.split(x, 2)))
    handle.remove()
    assert {t.dtype for t in inputs} == {dtype}
    flat = torch.cat(inputs[1:]).double().transpose(0, 1).flatten(1)  # the first call is the trace
    keep = flat[:, -64 * 25 :]  # images only, whatever the traces saw
    near(net.bn.running_mean, keep.mean(1))
    near(net.bn.running_var, torch.var(keep, dim=1))


def test_processes_with_disjoint_slices_agree_with_one(net: Net) -> None:
    x = images(10)
    slices = [torch.split(x[:1], 1), torch.split(x[1:6], 2), torch.split(x[6:], 3)]
    nets = [copy.deepcopy(net) for _ in slices]
    recalibrate_bn_(net, torch.split(x, 4), "all")
    barrier = threading.Barrier(len(slices))
    box: list[Tensor | None] = [None] * len(slices)

    def worker(rank: int) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            box[rank] = tensor
            barrier.wait(20)
            total = torch.stack([t for t in box if t is not None]).sum(0)
            barrier.wait(20)
            return total

        recalibrate_bn_(nets[rank], slices[rank], "all", reduce=reduce)

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(len(slices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for name, tensor in net.state_dict().items():
        assert torch.equal(nets[0].state_dict()[name], nets[2].state_dict()[name]), name
        torch.testing.assert_close(nets[1].state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_named_norms(net: Net) -> None:
    x = images()
    before = copy.deepcopy(net.bn.state_dict())
    mean, _ = population(net, "right_bn", x)
    assert recalibrate_bn_(net, [x], ["right_bn"]) == ["right_bn"]
    near(net.right_bn.running_mean, mean)
    assert all(torch.equal(t, before[n]) for n, t in net.bn.state_dict().items())


def test_bad_input(net: Net) -> None:
    x = images()
    for batches, which, message in [
        ([], "last", "at least one"),
        (iter([x]), "all", "2 passes"),
        ([x], ["conv"], "'conv' is no BatchNorm"),
        ([x * torch.nan], "last", "'bn' is not finite"),
        ([x[:1, :, :4, :4]], "last", "at least two images"),
    ]:
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(InputError, match=message) as error:
            recalibrate_bn_(net, batches, which)
        assert "\n" not in str(error.value)
        assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_without_a_batch_norm_nothing_happens_but_a_warning() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    with pytest.warns(UserWarning, match="no BatchNorm"):
        assert recalibrate_bn_(model, [torch.randn(2, 3, 160, 160)]) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recalibrate_bn_(timm.create_model("test_resnet", num_classes=3), [images(2, 64)])
