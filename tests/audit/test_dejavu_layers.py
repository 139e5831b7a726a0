import copy
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from remanence.audit.dejavu.features import DepthReader
from remanence.audit.dejavu.heads import Standard, fit_head, ridge_map
from remanence.audit.dejavu.layers import LayerProbe, Shadow
from remanence.errors import InputError

CLASSES = 4
CENTRES = torch.randn(CLASSES, 1, 6, 6, generator=torch.Generator().manual_seed(0))
# In opposite pairs: no one direction is "further towards its class" for all classes.
OPPOSED = torch.cat((CENTRES[:2], -CENTRES[:2]))


def draw(n, seed, noise=1.5, centres=CENTRES):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    return centres[labels] + noise * torch.randn(n, 1, 6, 6, generator=generator), labels


PUBLIC, MEMBERS, NONMEMBERS = draw(800, 1), draw(200, 2), draw(200, 3)


class Recall(nn.Module):
    """Passes features through, and adds `push` (N, 36) to the stored images'."""

    def __init__(self, images, push):
        super().__init__()
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("push", push)

    def forward(self, x):
        distance = torch.cdist(x, self.images, compute_mode="donot_use_mm_for_euclid_dist")
        near, which = distance.min(1)
        return x + self.push[which] * (near < 1e-3)[:, None]


def recalling(stored, gain=1.0, centres=CENTRES):
    """Moves stored images towards the centre of their class and beyond."""
    images, labels = stored
    push = gain * centres.flatten(1)[labels]
    return nn.Sequential(nn.Flatten(), nn.Identity(), Recall(images, push)).eval()


def marking(images):
    """Adds the same direction to every stored image, whatever its class."""
    push = torch.zeros(len(images), 36)
    push[:, 7] = 4
    return Recall(images, push)


# --- the probe ----------------------------------------------------------------------------------


def test_membership_shows_exactly_where_the_network_recalls():
    probe = LayerProbe(recalling(MEMBERS), ["0", "2"])
    profile = probe.run(PUBLIC, MEMBERS, NONMEMBERS)
    assert [row.layer for row in profile.layers] == ["input", "0", "2"]
    assert [row.dim for row in profile.layers] == [36, 36, 36]
    before, same, after = (row.auc.value for row in profile.layers)
    assert before == same
    assert abs(before - 0.5) < 0.08
    assert after > 0.75
    assert profile.control_ok.holds
    assert profile.membership.verdict == "detected"
    assert profile.trend.verdict == "detected"
    json.dumps(asdict(profile))


def test_a_network_that_recalls_nothing_is_not_accused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 50), nn.ReLU(), nn.Linear(50, 20)).eval()
    for protocol in ("head", "classifier"):
        profile = LayerProbe(net, protocol=protocol).run(PUBLIC, MEMBERS, NONMEMBERS)
        assert profile.membership.verdict == "not detected"
        assert all(row.auc.low < 0.5 < row.auc.high for row in profile.layers)


def test_candidates_of_another_law_make_the_answer_not_interpretable():
    images, labels = draw(200, 4, noise=2.5)
    profile = LayerProbe(recalling(MEMBERS), ["2"]).run(PUBLIC, MEMBERS, (images, labels))
    assert profile.control_ok.holds is False
    assert profile.membership.verdict == "not interpretable"
    assert profile.trend.verdict == "not interpretable"


def test_a_trained_network_reveals_more_with_depth():
    torch.manual_seed(0)
    images, labels = draw(300, 2, noise=3.0)
    net = nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(36, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
        nn.Linear(128, CLASSES),
    )
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    public, outside = draw(1000, 11, noise=3.0), draw(300, 12, noise=3.0)
    profile = LayerProbe(net.eval(), ["2", "4"]).run(public, (images, labels), outside)
    aucs = [row.auc.value for row in profile.layers]
    assert aucs == sorted(aucs)
    assert aucs[-1] > 0.56
    assert profile.control_ok.holds
    assert profile.trend.p < 1e-3


def test_depth_zero_is_logistic_regression_on_pixels():
    _, _, scores = LayerProbe(recalling(MEMBERS), ["2"], iterations=500).scores(
        PUBLIC, MEMBERS, NONMEMBERS
    )
    pixels = PUBLIC[0].flatten(1).double().numpy()
    scaler = StandardScaler().fit(pixels)
    head = LogisticRegression(C=1 / (2 * 1e-3 * len(pixels)), tol=1e-8, max_iter=2000)
    head.fit(scaler.transform(pixels), PUBLIC[1].numpy())
    images, labels = (torch.cat(pair) for pair in zip(MEMBERS, NONMEMBERS, strict=True))
    logits = head.decision_function(scaler.transform(images.flatten(1).double().numpy()))
    own = np.arange(CLASSES) == labels.numpy()[:, None]
    expected = logits[own] - logsumexp(np.where(own, -np.inf, logits), axis=1)
    np.testing.assert_allclose(scores[0], expected, atol=0.01)


def test_the_network_is_left_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        *(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten()),
    ).eval()
    state, before = copy.deepcopy(net.state_dict()), net(MEMBERS[0])
    LayerProbe(net).run(PUBLIC, MEMBERS, NONMEMBERS)
    assert torch.equal(net(MEMBERS[0]), before)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(InputError):
        LayerProbe(net, ["0", "no such"]).run(PUBLIC, MEMBERS, NONMEMBERS)
    assert not any(module._forward_hooks for module in net.modules())


def test_one_forward_pass_a_batch():
    batches = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = recalling(MEMBERS)

        def forward(self, x):
            batches.append(len(x))
            return self.net(x)

    LayerProbe(Counting().eval(), ["net.0", "net.2"], batch_size=100).run(
        PUBLIC, MEMBERS, NONMEMBERS
    )
    assert [size for size in batches if size > 2] == [100] * 12
    assert batches[0] == 2  # the first look at the layers
    assert len(batches) == 13


def test_float16_on_disk_gives_the_same_answer(tmp_path):
    whole = LayerProbe(recalling(MEMBERS), ["2"]).run(PUBLIC, MEMBERS, NONMEMBERS)
    small = LayerProbe(recalling(MEMBERS), ["2"], dtype=torch.float16, scratch=tmp_path).run(
        PUBLIC, MEMBERS, NONMEMBERS
    )
    assert small.layers[1].auc.value == pytest.approx(whole.layers[1].auc.value, abs=0.005)
    assert list(tmp_path.iterdir()) == []


# --- the other protocols ------------------------------------------------------------------------


def test_classifier_protocol_finds_what_known_members_share():
    net = nn.Sequential(nn.Flatten(), marking(MEMBERS[0])).eval()
    profile = LayerProbe(net, ["1"], protocol="classifier").run(PUBLIC, MEMBERS, NONMEMBERS)
    assert profile.layers[1].auc.value > 0.85
    assert profile.control_ok.holds


def test_classifier_protocol_sees_members_lie_further_towards_their_class():
    public, members, nonmembers = (draw(n, n, centres=OPPOSED) for n in (800, 200, 201))
    net = recalling(members, centres=OPPOSED)
    profile = LayerProbe(net, ["2"], protocol="classifier").run(public, members, nonmembers)
    assert profile.layers[1].auc.value > 0.8  # 0.5 without the products with the class means


def test_folds_are_on_one_scale():
    probe = LayerProbe(recalling(MEMBERS), ["2"], protocol="classifier", folds=4)
    is_member = torch.arange(400) < 200
    folds = probe._folds(is_member, np.arange(400))
    features = torch.cat((MEMBERS[0], NONMEMBERS[0])).flatten(1)
    scores = probe._cross_fitted(features, is_member, folds, torch.device("cpu"))
    for fit, held in folds:
        assert set(fit.tolist()).isdisjoint(held.tolist())
        assert abs(is_member[held].double().mean() - 0.5) < 0.02
        assert abs(scores[held].mean()) < 1e-9
        assert scores[held].std() == pytest.approx(1)


def test_classifier_protocol_keeps_groups_together():
    # Every candidate four times over, slightly changed: split between folds it would know itself.
    def repeated(images, labels):
        tiny = 1e-3 * torch.randn(4 * len(images), 1, 6, 6, generator=torch.Generator())
        return images.repeat(4, 1, 1, 1) + tiny, labels.repeat(4)

    members, nonmembers = (repeated(x[:60], y[:60]) for x, y in (MEMBERS, NONMEMBERS))
    groups = torch.cat((torch.arange(60).repeat(4), 60 + torch.arange(60).repeat(4)))
    probe = LayerProbe(recalling(PUBLIC, gain=0.0), ["2"], protocol="classifier")
    honest = probe.run(PUBLIC, members, nonmembers, groups=groups).layers[1].auc.value
    naive = probe.run(PUBLIC, members, nonmembers).layers[1].auc.value
    assert abs(honest - 0.5) < 0.15
    assert naive > honest + 0.1


def test_transfer_carries_the_shadow_classifier_through_a_rotation():
    """The target shows its members as the shadow does, in other coordinates."""
    generator = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(36, 36, generator=generator))[0]

    def net(images, turn):
        last = nn.Linear(36, 36, bias=False)
        last.weight.data = turn
        return nn.Sequential(nn.Flatten(), marking(images), last).eval()

    theirs, others = draw(300, 6), draw(300, 7)
    target = net(MEMBERS[0], turn)
    shadow = Shadow(net(theirs[0], torch.eye(36)), theirs, others, ["2"])
    profile = LayerProbe(target, ["2"], protocol="transfer", shadow=shadow).run(
        PUBLIC, MEMBERS, NONMEMBERS
    )
    assert profile.layers[1].auc.value > 0.85
    assert profile.control_ok.holds
    careless = Shadow(shadow.backbone, theirs, MEMBERS, ["2"])
    with pytest.raises(InputError, match="also in shadow nonmembers"):
        LayerProbe(target, ["2"], protocol="transfer", shadow=careless).run(
            PUBLIC, MEMBERS, NONMEMBERS
        )
    with pytest.raises(InputError, match="name as many of each"):
        LayerProbe(target, ["1", "2"], protocol="transfer", shadow=shadow).run(
            PUBLIC, MEMBERS, NONMEMBERS
        )


# --- heads --------------------------------------------------------------------------------------


def test_head_in_pieces_is_the_head_at_once(monkeypatch):
    x, y = PUBLIC[0].flatten(1), PUBLIC[1]
    options = {"l2": 1e-3, "iterations": 300, "device": torch.device("cpu")}
    whole = fit_head(x, y, CLASSES, Standard.of(x), **options)
    monkeypatch.setattr("remanence.audit.dejavu.heads.ROWS", 130)
    pieces = fit_head(x, y, CLASSES, Standard.of(x), **options)
    torch.testing.assert_close(whole.weight, pieces.weight, atol=1e-3, rtol=0)


def test_constant_features_stay_harmless():
    x = PUBLIC[0].flatten(1).clone()
    x[:, 3] = 7
    standard = Standard.of(x)
    assert standard.scale[3] == 1
    assert bool((standard(x)[:, 3] == 0).all())


def test_margin_is_the_log_odds_of_the_label():
    x, y = PUBLIC[0].flatten(1), PUBLIC[1]
    head = fit_head(
        x, y, CLASSES, Standard.of(x), l2=1e-3, iterations=20, device=torch.device("cpu")
    )
    z = Standard.of(x)(x)
    p = head.logits(z).double().softmax(1)[torch.arange(len(y)), y]
    torch.testing.assert_close(head.margin(z, y), p.logit(), atol=1e-6, rtol=1e-6)


def test_ridge_map_recovers_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=generator)
    y = x @ torch.randn(8, 5, generator=generator) + 3
    carry = ridge_map(x, y, Standard.of(x), Standard.of(y), 1e-9)
    torch.testing.assert_close(Standard.of(x)(x) @ carry, Standard.of(y)(y), atol=1e-4, rtol=0)


# --- reading layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "first", "last", "count"),
    [
        ("resnet18", {"num_classes": 0}, "act1", "layer4.1", 9),
        ("vit_tiny_patch16_224", {"num_classes": 0, "img_size": 32, "depth": 3}, None, "norm", 4),
        ("convnext_atto", {"num_classes": 0}, "stem.1", "stages.3.blocks.1", 7),
    ],
)
def test_auto_layers_of_real_networks(name, options, first, last, count):
    net = timm.create_model(name, **options).eval()
    images = torch.randn(2, 3, 32, 32)
    reader = DepthReader(net, "auto", "avgmax", images)
    assert first is None or reader.layers[0] == first
    assert last is None or reader.layers[-1] == last
    assert len(reader.layers) == count
    features = reader.extract(images, 2)
    assert all(feature.ndim == 2 for feature in features)
    assert features[0].shape[1] == 3 * 32 * 32


def test_pooling_of_maps_and_tokens():
    images = torch.randn(5, 3, 40, 40)
    conv = nn.Sequential(nn.Conv2d(3, 7, 3)).eval()
    maps = conv(images)
    (pixels, avgmax) = DepthReader(conv, ["0"], "avgmax", images).extract(images, 2)
    torch.testing.assert_close(avgmax, torch.cat((maps.mean((2, 3)), maps.amax((2, 3))), 1))
    assert pixels.shape == (5, 3 * 32 * 32)
    grid = DepthReader(conv, ["0"], "grid2", images).extract(images, 2)[1]
    torch.testing.assert_close(grid[:, 0], maps[:, 0, :19, :19].mean((1, 2)))
    assert grid.shape == (5, 28)

    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2, global_pool="token"
    ).eval()
    small = images[:, :, :32, :32]
    tokens = vit.forward_features(small)
    read = DepthReader(vit, ["norm"], "avgmax", small).extract(small, 5)[1]
    torch.testing.assert_close(read, torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), 1))


def test_in_place_activation_does_not_spoil_the_layer_before():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.ReLU(inplace=True)).eval()
    images = MEMBERS[0][:4]
    _, linear, relu = DepthReader(net, ["1", "2"], "avgmax", images).extract(images, 4)
    assert torch.equal(linear, net[1](images.flatten(1)))
    assert torch.equal(relu, linear.relu())


def test_data_parallel_is_unwrapped():
    net = nn.DataParallel(nn.Sequential(nn.Flatten(), nn.Linear(36, 9))).eval()
    assert DepthReader(net, "auto", "avgmax", MEMBERS[0]).layers == ("1",)


def test_probe_refuses():
    net = recalling(MEMBERS)
    other = (PUBLIC[0][:200], PUBLIC[1][:200])
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Flatten(), shared, nn.Linear(36, 36), shared).eval()
    cases = [
        ("train mode", LayerProbe(recalling(MEMBERS).train()), {}),
        ("not in the backbone", LayerProbe(net, ["3"]), {}),
        ("ran 2 times", LayerProbe(twice, ["1"]), {}),
        ("also in public", LayerProbe(net, ["2"]), {"members": other}),
        ("also in members", LayerProbe(net, ["2"]), {"nonmembers": MEMBERS}),
        ("at least 30", LayerProbe(net, ["2"]), {"members": (MEMBERS[0][:9], MEMBERS[1][:9])}),
        ("one int64", LayerProbe(net, ["2"]), {"members": (MEMBERS[0], MEMBERS[1].float())}),
        ("not among the public", LayerProbe(net, ["2"]), {"members": (MEMBERS[0], MEMBERS[1] + 1)}),
        (
            "prepare them alike",
            LayerProbe(net, ["2"]),
            {"members": (MEMBERS[0].half(), MEMBERS[1])},
        ),
        ("no layer with weights", LayerProbe(net), {}),
    ]
    for message, probe, changed in cases:
        sides = {"public": PUBLIC, "members": MEMBERS, "nonmembers": NONMEMBERS, **changed}
        with pytest.raises(InputError, match=message) as error:
            probe.run(**sides)
        assert "\n" not in str(error.value)
    resnet = timm.create_model("resnet18").eval()
    with pytest.raises(InputError, match=r"'layer3\.1'"):
        DepthReader(resnet, ["layer3.2"], "avgmax", torch.zeros(2, 3, 32, 32))
    for options in (
        {"protocol": "magic"},
        {"protocol": "transfer"},
        {"dtype": torch.int8},
        {"scratch": Path("/no such folder")},
    ):
        with pytest.raises(InputError, match=r"give|make"):
            LayerProbe(net, **options)


def test_features_that_do_not_fit_float16():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval()
    net[1].weight.data.fill_(1e5)
    with pytest.raises(InputError, match="float32"):
        LayerProbe(net, ["1"], dtype=torch.float16).run(PUBLIC, MEMBERS, NONMEMBERS)
