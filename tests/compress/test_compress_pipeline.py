"""Whole networks: order, untouched sources, resumption, ranks, and unusual layers."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from remanence.compress.modules.replace import float_copy, quantised_layers
from remanence.compress.network.calibration import mean_kl
from remanence.compress.network.finetune import finetune
from remanence.compress.network.gather import Calibration, gather_moments
from remanence.compress.network.layers import find_layers
from remanence.compress.network.pipeline import compress
from remanence.compress.network.trace import trace
from remanence.compress.planning.plan import LayerPlan, Plan, plan
from remanence.compress.quantizer.moments import Moments
from remanence.errors import InputError


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(16, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3
    return model


def batches(count=4, size=8, shape=(3, 8, 8)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, *shape, generator=generator) for _ in range(count)]


def coarse(model, codewords=8, only=None):
    """Every layer (or those named) with few codewords, a 3 x 3 kernel or two weights a block."""
    layers = find_layers(model).values()
    return Plan(
        tuple(
            LayerPlan(x.name, x.layout, x.layout.taps if x.layout.taps > 1 else 2, codewords)
            for x in layers
            if only is None or x.name in only
        )
    )


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[n].codes, other[n].codes)
        and torch.equal(one[n].codebook, other[n].codebook)
        for n in one
    )


def test_the_source_is_untouched():
    """Oracle 14, traps T3 and T8."""
    model = network().train()
    model[5].eval()
    model[0].weight.requires_grad_(requires_grad=False)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = compress(model, coarse(model), batches())
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 8
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    ours = {p.data_ptr() for p in made.model.parameters()}
    assert not ours & {p.data_ptr() for p in model.parameters()}
    assert made.teacher_kl > 1e-3
    assert not made.model.training
    assert [layer.name for layer in made.report] == ["0", "3", "6", "9"]


def test_the_reported_divergence_is_that_of_the_returned_network():
    model = network()
    data = batches(5)
    made = compress(model, coarse(model), data)
    assert made.teacher_kl == pytest.approx(mean_kl(model, made.model, data[4:]), rel=1e-6)
    for name, layer in quantised_layers(made.model).items():
        assert torch.equal(layer.weight, made.quantised[name].weight())


def test_same_seed_same_codes_and_another_seed_others():
    model = network()
    first = compress(model, coarse(model), batches(), positions=64)
    assert same(
        first.quantised, compress(model, coarse(model), iter(batches()), positions=64).quantised
    )
    other = compress(model, coarse(model), batches(), positions=64, seed=1)
    assert not same(first.quantised, other.quantised)


def moments_of(student, teacher, name, data, positions):
    mine, theirs = find_layers(student), find_layers(teacher)
    traced = trace(student, mine, data[0])
    calibration = Calibration.check(data, positions, 0, None)
    found = gather_moments(
        student, teacher, {name: (mine[name], theirs[name])}, {name: 1}, traced, calibration
    )
    return found[name]


def test_moments_are_those_of_both_networks_over_all_batches():
    """Trap T3: they move once a layer below is quantised."""
    teacher = network().eval()
    student = copy.deepcopy(teacher)
    student[0].weight.data *= 0.5
    data = batches(3)
    found = moments_of(student, teacher, "6", data, 2**17)
    x = torch.cat([student[:6](batch) for batch in data]).permute(0, 2, 3, 1).reshape(-1, 16)
    y = torch.cat([teacher[:6](batch) for batch in data]).permute(0, 2, 3, 1).reshape(-1, 16)
    assert found.count == len(x)
    torch.testing.assert_close(found.second[0].float(), x.T @ x / len(x))
    torch.testing.assert_close(found.cross[0].float(), y.T @ x / len(x))
    above = moments_of(copy.deepcopy(teacher), teacher, "6", data, 2**17)
    assert not torch.allclose(found.second, above.second)


def test_teacher_and_student_are_seen_at_the_same_positions():
    teacher = network().eval()
    found = moments_of(copy.deepcopy(teacher), teacher, "3", batches(), 40)
    assert 40 <= found.count <= 48
    torch.testing.assert_close(found.cross, found.second)


def test_an_interrupted_run_goes_on_to_the_same_end():
    model = network()
    finished = {}
    whole = compress(
        model, coarse(model), batches(), on_layer=lambda x: finished.update({x.report.name: x})
    )
    part = {name: finished[name] for name in ("0", "3")}
    later = []
    again = compress(
        model, coarse(model), batches(), done=part, on_layer=lambda x: later.append(x.report.name)
    )
    assert later == ["6", "9"]
    assert same(whole.quantised, again.quantised)
    state = again.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.model.state_dict().items())


def test_the_teachers_target_stops_the_build_up_of_error():
    model = network()
    made = {
        target: compress(model, coarse(model), batches(8, 32), metric="plain", target=target)
        for target in ("weights", "teacher")
    }
    assert made["teacher"].teacher_kl < 0.8 * made["weights"].teacher_kl


def test_the_mean_output_is_the_teachers():
    """Into a bias, or into the running mean of the norm that follows."""
    model = network().eval()
    data = batches()
    x = torch.cat(data)
    for name, stop, taker in (("0", 2, "norm"), ("3", 4, "bias")):
        made = {
            bias: compress(model, coarse(model, 4, [name]), data, bias=bias, norms="keep")
            for bias in (True, False)
        }
        assert made[True].report[0].bias == taker
        assert made[False].report[0].bias == "none"
        wanted = model[:stop](x).mean((0, 2, 3))
        off = {b: (m.model[:stop](x).mean((0, 2, 3)) - wanted).abs().max() for b, m in made.items()}
        assert off[True] < 1e-4
        assert off[False] > 1e-3


def test_a_layer_that_was_quantised_before_comes_back_as_it_was():
    """Oracle 11."""
    model = network()
    first = compress(model, coarse(model), batches(), target="weights")
    again = compress(
        float_copy(first.model), coarse(model), batches(), target="weights", norms="keep"
    )
    for name, quantised in first.quantised.items():
        assert torch.equal(again.quantised[name].weight(), quantised.weight())
    assert again.teacher_kl == pytest.approx(0, abs=1e-6)


def test_a_layer_without_signal_is_said_to_have_none():
    model = network()
    model[3].weight.data.zero_()
    model[3].bias.data.fill_(-1)
    made = compress(model, coarse(model, only=["6", "9"]), batches())
    assert [layer.no_signal for layer in made.report] == [True, False]


def test_one_layer_is_tuned_right_after_it():
    model = network()
    plain = compress(model, coarse(model, 4, ["6"]), batches(), metric="plain")
    tuned = compress(model, coarse(model, 4, ["6"]), batches(), metric="plain", layer_steps=30)
    assert tuned.teacher_kl < plain.teacher_kl
    assert torch.equal(tuned.quantised["6"].codes, plain.quantised["6"].codes)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, memory):
        x = self.embed(tokens)
        return self.head(x + self.cross(x, memory, memory)[0])


def test_ties_cross_attention_and_keyword_batches():
    """Trap T15."""
    torch.manual_seed(0)
    model = Tied()
    data = [{"tokens": torch.randint(32, (4, 6)), "memory": torch.randn(4, 3, 8)} for _ in range(3)]
    made = compress(model, coarse(model), data)
    assert made.model.head.codebook is made.model.embed.codebook
    assert sorted(made.quantised) == ["cross.in_proj", "cross.out_proj", "embed"]
    assert made.model(**data[0]).shape == (4, 6, 32)
    curve = finetune(made.model, model, data, holdout=data, steps=20)
    assert min(point.holdout_kl for point in curve) < curve[0].holdout_kl


def vision_transformer():
    import timm  # the ranks' processes do without

    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    return timm.create_model("deit_tiny_patch16_224", num_classes=10, **sizes)


UNUSUAL = {
    "vision transformer": (vision_transformer, (3, 16, 16)),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
        ),
        (5, 32),
    ),
    "decoder": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(16, 32, 4, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 8, 4, 2, 1, groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 3, 3, padding=1),
        ),
        (16, 4, 4),
    ),
    "five channels": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 3),
            nn.ReLU(),
            nn.Conv2d(5, 20, 3, padding=1),
            nn.Conv2d(20, 5, 1),
            nn.Conv2d(5, 20, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(20, 10),
        ),
        (3, 12, 12),
    ),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_networks_go_through(kind):
    build, shape = UNUSUAL[kind]
    torch.manual_seed(0)
    model = build()
    planned = plan(model, {"base": "small", "first": {"channels": 1}})
    made = compress(model, planned, batches(3, 8, shape))
    assert sorted(made.quantised) == sorted(layer.name for layer in planned.layers)
    assert all(layer.output_error < 0.9 for layer in made.report)
    assert 0 < made.teacher_kl < 0.1


RANKS = """
    import sys
    import torch
    from torch import distributed as dist
    sys.path.insert(0, {folder!r})
    from test_compress_pipeline import batches, coarse, network
    from remanence.compress.network.pipeline import compress

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
    model = network()
    made = compress(model, coarse(model), batches(6)[rank::2], positions=90, layer_steps=0)
    quantised = {{n: (q.codes, q.codebook) for n, q in made.quantised.items()}}
    torch.save((quantised, made.model.state_dict(), made.teacher_kl), f"{out}.{{rank}}")
    dist.destroy_process_group()
"""


def test_two_ranks_make_one_processs_network(tmp_path, request):
    script = textwrap.dedent(RANKS).format(
        folder=str(request.path.parent), store=tmp_path / "store", out=tmp_path / "out"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank)]) for rank in range(2)]
    model = network()
    alone = compress(model, coarse(model), batches(6), positions=90)
    assert [process.wait(60) for process in ranks] == [0, 0]
    for rank in range(2):
        quantised, state, kl = torch.load(tmp_path / f"out.{rank}")
        for name, (codes, codebook) in quantised.items():
            assert torch.equal(codes, alone.quantised[name].codes)
            assert torch.equal(codebook, alone.quantised[name].codebook)
        for key, value in alone.model.state_dict().items():
            torch.testing.assert_close(state[key], value)
        assert kl == pytest.approx(alone.teacher_kl)


def test_bad_input_is_refused_in_one_line():
    model = network()
    good = coarse(model)

    def refused(message, data=None, planned=good, net=model, **options):
        with pytest.raises(InputError, match=message) as error:
            compress(net, planned, batches() if data is None else data, **options)
        assert "\n" not in str(error.value)

    refused("no calibration batch", data=[])
    refused("batch 1 is empty", data=[torch.zeros(2, 3, 8, 8), torch.zeros(0, 3, 8, 8)])
    refused("batch 0 holds NaN", data=[torch.full((2, 3, 8, 8), torch.nan)])
    refused(r"cannot run a calibration batch of shape \(2, 4, 8, 8\)", [torch.zeros(2, 4, 8, 8)])
    refused("inputs alone", data=[(torch.zeros(2, 3, 8, 8), torch.zeros(2))])
    refused("plan's layer 0 is not in the model", planned=good, net=nn.Linear(3, 4))
    refused("quantises no layer", planned=Plan(()))
    refused("metric", metric="best")
    broken = copy.deepcopy(model)
    broken[3].weight.data[0] = torch.nan
    refused("3: its weight holds NaN", net=broken)
    infinite = copy.deepcopy(model)
    infinite[3].bias.data[0] = torch.inf
    refused("6: .*NaN or infinity", net=infinite)


def test_the_search_leaves_the_mean_to_the_bias(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64))
    mixing = torch.randn(32, 32) / 6
    batches = [torch.randn(64, 32) @ mixing + 4 for _ in range(8)]
    unseen = torch.randn(512, 32) @ mixing + 4
    planned = plan(model, {"head": {"channels": 4, "codewords": 16}})

    def error():
        made = compress(model, planned, batches)
        assert made.report[0].bias == "bias"
        with torch.no_grad():
            return (made.model(unseen) - model(unseen)).square().mean().item()

    ours = error()
    monkeypatch.setattr(Moments, "centred", lambda moments: moments)
    assert ours < 0.8 * error()


def test_a_constant_input_is_no_lack_of_signal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64))
    planned = plan(model, {"head": {"channels": 4, "codewords": 16}})
    batches = [torch.full((8, 32), 2.0)] * 4
    made = compress(model, planned, batches)
    assert not made.report[0].no_signal
    torch.testing.assert_close(made.model(batches[0]), model(batches[0]), rtol=0, atol=1e-4)
