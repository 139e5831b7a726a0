import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from sklearn.decomposition import PCA

from remanence.errors import InputError
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.moments import Moments
from remanence.search.kernel_descriptor.whitening import KINDS, Whitening

OXFORD = Path(__file__).parents[2] / "../shared/data/oxford_affine"

E = 24  # length of the test vectors
UNLABELLED = ("pca", "pcaw", "pcawt", "pcaws")


def _vectors(count=600, seed=0):
    """Unit vectors with a mean and a falling spectrum, float64."""
    rng = np.random.default_rng(seed)
    mix = scipy.linalg.qr(np.random.default_rng(1).normal(size=(E, E)))[0]
    raw = rng.normal(size=(count, E)) * np.geomspace(1, 0.02, E) @ mix + 0.4
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def _pairs(count=400, seed=0):
    rng = np.random.default_rng(seed + 100)
    q = _vectors(count, seed)
    mix = scipy.linalg.qr(np.random.default_rng(2).normal(size=(E, E)))[0]
    p = q + 0.1 * rng.normal(size=(count, E)) * np.geomspace(1, 0.05, E) @ mix
    return q, p / np.linalg.norm(p, axis=1, keepdims=True)


def _moments(vectors=None, pairs=None):
    moments = Moments(E)
    if vectors is not None:
        moments.add(torch.from_numpy(vectors))
    if pairs is not None:
        moments.add_pairs(torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1]))
    return moments


def _fit(kind, dim=E, vectors=None, pairs=None, **options):
    if kind in UNLABELLED:
        vectors = _vectors() if vectors is None else vectors
    else:
        pairs = _pairs() if pairs is None else pairs
    return Whitening.fit(_moments(vectors, pairs), kind, dim=dim, **options)


def _unit(y):
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def _spectrum(x):
    """Eigenvalues over the largest, descending, and eigenvectors, by numpy."""
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    return values[::-1] / values[-1], vectors[:, ::-1]


def _distances(y):
    y = torch.as_tensor(y)
    return torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").numpy()


# ------------------------------------------------------------------- without labels


def test_pca_is_scikit_learns_with_its_power():
    x, new = _vectors(), _vectors(50, seed=3)
    y = PCA(10, svd_solver="full").fit(x).transform(new)
    wanted = _unit(np.sign(y) * np.sqrt(np.abs(y)))
    found = _fit("pca", 10)(torch.from_numpy(new)).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(wanted), rtol=0, atol=1e-8)
    np.testing.assert_allclose(_distances(found), _distances(wanted), rtol=0, atol=1e-8)


def test_full_whitening_is_scikit_learns():
    x, new = _vectors(), _vectors(50, seed=3)
    wanted = _unit(PCA(10, whiten=True, svd_solver="full").fit(x).transform(new))
    found = _fit("pcaw", 10)(torch.from_numpy(new)).numpy()
    np.testing.assert_allclose(_distances(found), _distances(wanted), rtol=0, atol=1e-8)


def test_full_whitening_gives_every_direction_the_first_ones_variance():
    x = _vectors()
    whitening = _fit("pcaw")
    y = (x - whitening.mean.numpy()) @ whitening.projection.numpy()
    first = np.linalg.eigvalsh(np.cov(x.T, bias=True))[-1]
    np.testing.assert_allclose(np.cov(y.T, bias=True), first * np.eye(E), rtol=0, atol=1e-9)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 1.0])
def test_attenuated_whitening_is_its_formula(t):
    x, new = _vectors(), _vectors(50, seed=3)
    values, vectors = _spectrum(x)
    wanted = _unit((new - x.mean(0)) @ (vectors * values ** (-t / 2))[:, :15])
    found = _fit("pcawt", 15, t=t)(torch.from_numpy(new)).numpy()
    np.testing.assert_allclose(_distances(found), _distances(wanted), rtol=0, atol=1e-8)


def test_no_whitening_keeps_distances():
    x = _vectors()
    for whitening in (_fit("pcawt", t=0.0), _fit("pcaws", keval=0)):
        y = (x - whitening.mean.numpy()) @ whitening.projection.numpy()
        np.testing.assert_allclose(_distances(y), _distances(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dim", [5, 15])
def test_shrinkage_reads_its_level_from_the_full_spectrum(dim):
    x, new = _vectors(), _vectors(50, seed=3)
    values, vectors = _spectrum(x)
    level = values[9]
    scale = ((1 - level) * values + level) ** -0.5
    wanted = _unit((new - x.mean(0)) @ (vectors * scale)[:, :dim])
    found = _fit("pcaws", dim, keval=9)(torch.from_numpy(new)).numpy()
    np.testing.assert_allclose(_distances(found), _distances(wanted), rtol=0, atol=1e-8)


def test_a_published_model_is_applied_as_fitted_ones_are():
    x = _vectors()
    values, vectors = _spectrum(x)
    for kind in UNLABELLED:
        given = Whitening.from_eigen(
            torch.from_numpy(x.mean(0)),
            torch.from_numpy(vectors.copy()),
            torch.from_numpy(5 * values),  # the scale is not to matter
            kind,
            dim=8,
            keval=9,
        )
        fitted = _fit(kind, 8, keval=9)
        new = torch.from_numpy(_vectors(20, seed=3))
        np.testing.assert_allclose(
            _distances(given(new)), _distances(fitted(new)), rtol=0, atol=1e-8
        )


# ------------------------------------------------------------------- from matching pairs


@pytest.mark.parametrize("labelled_only", [True, False])
@pytest.mark.parametrize("kind", ["lw", "lws"])
def test_supervised_whitening_solves_the_generalised_eigenproblem(kind, labelled_only):
    q, p = _pairs()
    x = None if labelled_only else _vectors(seed=7)
    whitening = _fit(kind, 10, vectors=x, pairs=(q, p), keval=9)
    mean = q.mean(0) if labelled_only else x.mean(0)
    np.testing.assert_allclose(whitening.mean, mean, rtol=0, atol=1e-12)
    centred = (np.concatenate([q, p]) if labelled_only else x) - mean
    within = (q - p).T @ (q - p) / len(q)
    if kind == "lws":
        spectrum = np.linalg.eigvalsh(within)[::-1]
        level = spectrum[9] / spectrum[0]
        within = (1 - level) * within / spectrum[0] + level * np.eye(E)
    directions = scipy.linalg.eigh(centred.T @ centred, within)[1][:, ::-1][:, :10]
    new = _vectors(50, seed=3)
    wanted = _unit((new - mean) @ directions)
    found = whitening(torch.from_numpy(new)).numpy()
    np.testing.assert_allclose(_distances(found), _distances(wanted), rtol=0, atol=1e-7)


def test_supervised_whitening_whitens_the_pairs_and_sorts_the_rest():
    q, p = _pairs()
    projection = _fit("lw", pairs=(q, p)).projection.numpy()
    difference = (q - p) @ projection
    np.testing.assert_allclose(difference.T @ difference / len(q), np.eye(E), rtol=0, atol=1e-9)
    z = (np.concatenate([q, p]) - q.mean(0)) @ projection
    total = z.T @ z
    np.testing.assert_allclose(total, np.diag(np.diag(total)), rtol=0, atol=1e-6 * total.max())
    assert (np.diff(np.diag(total)) < 0).all()


def test_pairs_tell_a_nuisance_from_a_signal():
    """The largest variance is what a patch and its match do not share."""
    rng = np.random.default_rng(0)

    def sample(count):
        signal = rng.normal(size=(count, E)) * np.where(np.arange(E) < 8, 0.3, 0)
        noise = rng.normal(size=(2, count, E)) * np.where(np.arange(E) < 8, 0.05, 1.0)
        return signal + noise

    train, (q, p) = sample(2000), sample(200)

    def recall(whitening):
        a, b = whitening(torch.from_numpy(q)), whitening(torch.from_numpy(p))
        return float(((a @ b.T).argmax(1) == torch.arange(len(q))).double().mean())

    supervised = recall(_fit("lw", 8, pairs=train))
    assert supervised > 0.9
    assert recall(_fit("lws", 8, pairs=train, keval=20)) > 0.9
    assert recall(_fit("pcaws", 8, vectors=train[0], keval=20)) < 0.2


def test_identical_directions_in_all_pairs_are_damped_with_a_warning():
    q, p = _pairs()
    p[:, 3] = q[:, 3]
    with pytest.warns(UserWarning, match="lws"):
        whitening = _fit("lw", pairs=(q, p))
    assert bool(whitening.projection.isfinite().all())


# ------------------------------------------------------------------- streaming


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_and_merging_equal_one_batch(kind):
    x, (q, p) = torch.from_numpy(_vectors()), map(torch.from_numpy, _pairs())
    whole = _moments(x.numpy(), (q.numpy(), p.numpy()))
    first, second = Moments(E), Moments(E)
    for i, rows in enumerate(x.split(37)):
        (first, second)[i % 2].add(rows)
    for i, (a, b) in enumerate(zip(q.split(53), p.split(53), strict=True)):
        (first, second)[i % 2].add_pairs(a, b)
    first.merge(second)
    assert (first.count, first.pairs) == (whole.count, whole.pairs) == (600, 400)
    found, wanted = (Whitening.fit(m, kind, dim=10, keval=9) for m in (first, whole))
    new = torch.from_numpy(_vectors(30, seed=3))
    np.testing.assert_allclose(_distances(found(new)), _distances(wanted(new)), rtol=0, atol=1e-8)


def test_float32_rows_are_summed_in_float64():
    x = torch.from_numpy(_vectors()).float()
    single, double = Moments(E), Moments(E)
    single.add(x)
    double.add(x.double())
    found, wanted = (Whitening.fit(m, "pcaw", dim=E).projection for m in (single, double))
    assert torch.equal(found, wanted)


# ------------------------------------------------------------------- flat patches, application


def test_flat_patches_neither_teach_nor_are_whitened():
    x, (q, p) = _vectors(), _pairs()
    padded = np.concatenate([np.zeros((50, E)), x])
    q0, p0 = np.concatenate([q, np.zeros((9, E))]), np.concatenate([p, q[:9]])
    clean, dirty = _moments(x, (q, p)), _moments(padded, (q0, p0))
    assert (dirty.count, dirty.pairs) == (clean.count, clean.pairs)
    for kind in KINDS:
        found = Whitening.fit(dirty, kind, dim=10, keval=9)
        wanted = Whitening.fit(clean, kind, dim=10, keval=9)
        rows = found(torch.from_numpy(padded[40:60]))
        assert not bool(rows[:10].any())
        torch.testing.assert_close(rows[10:].norm(dim=1), torch.ones(10, dtype=torch.float64))
        np.testing.assert_allclose(
            _distances(rows), _distances(wanted(torch.from_numpy(padded[40:60]))), atol=1e-7
        )


def test_float32_vectors_are_whitened_in_float32():
    x = torch.from_numpy(_vectors())
    for kind in KINDS:
        whitening = _fit(kind, 10, keval=9)
        found = whitening(x.float())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), whitening(x), rtol=0, atol=2e-3)
        assert whitening(x[:0].float()).shape == (0, 10)


def test_descriptors_of_patches_are_whitened_end_to_end():
    patches = torch.rand(300, 16, 16, generator=torch.Generator().manual_seed(0))
    describe = KernelDescriptor(kind="cartesian")
    moments = Moments(describe.dim)
    for chunk in patches.split(100):
        moments.add(describe(chunk).vectors)
    whitening = Whitening.fit(moments, dim=32, convention=describe.convention)
    vectors = describe(patches).vectors
    found = whitening(vectors)
    assert found.shape == (300, 32)
    raw, white = (torch.pdist(v).mean() for v in (vectors, found))
    assert float(white) > 4 * float(raw)  # the mean, which all patches share, is gone


def _cut(path, count, seed):
    """Patches of a photograph, and the same with errors of orientation, scale and place."""
    from PIL import Image

    image = torch.from_numpy(np.array(Image.open(path).convert("L"))).float() / 255
    extent = torch.tensor(image.T.shape)
    random = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=random) * (extent - 100) + 50
    y, x = torch.meshgrid(torch.linspace(-16, 16, 32), torch.linspace(-16, 16, 32), indexing="ij")
    cuts = []
    for size in (0.0, 1.0):
        angle, scale, across, down = size * torch.randn(4, count, 1, 1, generator=random)
        angle, scale = (10 * angle).deg2rad(), (0.12 * scale).exp()
        gx = scale * (angle.cos() * x - angle.sin() * y) + across
        gy = scale * (angle.sin() * x + angle.cos() * y) + down
        grid = torch.stack([gx, gy], -1) + centres[:, None, None]
        grid = (2 * grid + 1) / extent - 1
        source = image.expand(count, 1, -1, -1)
        cuts.append(torch.nn.functional.grid_sample(source, grid, align_corners=False).clamp(0, 1))
    return cuts


def test_whitening_learned_on_some_photographs_helps_on_another():
    if not OXFORD.exists():
        pytest.skip("needs ../shared/data/oxford_affine")
    describe = KernelDescriptor()
    moments = Moments(describe.dim)
    for seed, name in enumerate(("wall", "leuven")):
        q, p = (describe(cut).vectors for cut in _cut(OXFORD / name / "img1.png", 1000, seed))
        moments.add(q)
        moments.add_pairs(q, p)
    q, p = (describe(cut).vectors for cut in _cut(OXFORD / "boat" / "img1.png", 500, 9))

    def false_positive_rate(a, b):
        """Of different patches, at the similarity that 95% of the matching ones reach."""
        similar = a @ b.T
        different = ~torch.eye(len(a), dtype=torch.bool)
        accepted = similar[different] >= similar.diagonal().quantile(0.05)
        return float(accepted.float().mean())

    raw = false_positive_rate(q, p)
    rates = {}
    for kind in KINDS:
        whitening = Whitening.fit(moments, kind)
        rates[kind] = false_positive_rate(whitening(q), whitening(p))
    assert max(rates.values()) < 0.6 * raw


# ------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_whole_whitening(tmp_path, kind):
    whitening = _fit(kind, 10, t=0.4, keval=9, convention="mkd concat")
    whitening.save(tmp_path / "white.safetensors")
    loaded = Whitening.load(tmp_path / "white.safetensors", convention="mkd concat")
    for name in ("kind", "t", "keval", "count", "pairs", "convention"):
        assert getattr(loaded, name) == getattr(whitening, name)
    assert loaded.kind == kind
    x = torch.from_numpy(_vectors(20))
    assert torch.equal(loaded(x), whitening(x))


def test_a_file_of_other_descriptors_is_refused(tmp_path):
    polar, both = KernelDescriptor(kind="polar"), KernelDescriptor()
    assert polar.convention != both.convention
    assert KernelDescriptor(theta=(8, 3)).convention == both.convention
    assert KernelDescriptor(centrality=None).convention != both.convention
    path = tmp_path / "white.safetensors"
    _fit("pca", 10, convention=polar.convention).save(path)
    with pytest.raises(InputError, match="learned on"):
        Whitening.load(path, convention=both.convention)


def test_files_that_are_no_whitening_are_refused(tmp_path):
    path = tmp_path / "white.safetensors"
    with pytest.raises(InputError, match="no whitening"):
        Whitening.load(path)
    path.write_text("mean")
    with pytest.raises(InputError, match="not a whitening"):
        Whitening.load(path)
    save_file({"mean": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="not a whitening"):
        Whitening.load(path)
    fields = {
        "kind": "pca", "t": 0.7, "keval": 40, "count": 1, "pairs": 0, "convention": "x"
    }  # fmt: skip
    good = {"mean": torch.zeros(3), "projection": torch.ones(3, 2)}
    for change, tensors in (
        ({}, {**good, "mean": torch.zeros(4)}),
        ({}, {**good, "projection": torch.full((3, 2), float("nan"))}),
        ({"kind": "ica"}, good),
        ({"count": "many"}, good),
    ):
        text = json.dumps({**fields, **change})
        save_file(tensors, path, metadata={"remanence.search.whitening": text})
        with pytest.raises(InputError, match="not a whitening"):
            Whitening.load(path)


# ------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ica", {}, "pcaws"),
        ("pca", {"dim": 25}, "24"),
        ("pca", {"dim": 0}, "24"),
        ("pcawt", {"t": 1.5}, "t 1.5"),
        ("pcaws", {"keval": 24}, "keval"),
        ("lws", {"keval": -1}, "keval"),
    ],
)
def test_bad_settings_are_refused(kind, options, message):
    moments = _moments(_vectors(), _pairs())
    with pytest.raises(InputError, match=message):
        Whitening.fit(moments, kind, **{"dim": 10, "keval": 9, **options})


def test_too_little_to_learn_from_is_refused():
    with pytest.raises(InputError, match="no vectors"):
        Whitening.fit(Moments(E), "pca", dim=10)
    with pytest.raises(InputError, match="matching pairs"):
        Whitening.fit(_moments(_vectors()), "lw", dim=10)
    few = _vectors(15)
    for kind in ("pcaw", "pcawt"):
        with pytest.raises(InputError, match="pcaws"):
            _fit(kind, 20, vectors=few)
    with pytest.raises(InputError, match="keval"):
        _fit("pcaws", 20, vectors=few, keval=18)
    assert _fit("pcaws", 20, vectors=few, keval=9).projection.shape == (E, 20)
    q, p = _pairs(15)
    with pytest.raises(InputError, match="lws"):
        _fit("lw", 10, pairs=(q, p))
    assert _fit("lws", 10, pairs=(q, p), keval=9).projection.shape == (E, 10)
    same = np.tile(few[:1], (30, 1))
    with pytest.raises(InputError, match="alike"):
        _fit("pca", 10, vectors=same)
    with pytest.raises(InputError, match="alike"):
        _fit("lws", 10, pairs=(few, few), keval=9)


def test_bad_vectors_are_refused():
    moments = Moments(E)
    with pytest.raises(InputError, match="24"):
        moments.add(torch.zeros(3, E + 1))
    with pytest.raises(InputError, match="NaN"):
        moments.add(torch.full((3, E), float("nan")))
    with pytest.raises(InputError, match="as many"):
        moments.add_pairs(torch.zeros(3, E), torch.zeros(4, E))
    with pytest.raises(InputError, match="24"):
        moments.merge(Moments(E + 1))
    with pytest.raises(InputError, match="24"):
        _fit("pca", 10)(torch.zeros(3, E + 1))
    assert moments.count == moments.pairs == 0
