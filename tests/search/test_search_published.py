import numpy as np
import pytest
import scipy.io
import scipy.linalg
import torch

from remanence.errors import InputError
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.published import (
    whitening_from_matlab,
    whitening_from_mkd_pytorch,
)


def _patches(count=12, size=16):
    rng = torch.Generator().manual_seed(0)
    return torch.rand(count, size, size, dtype=torch.float64, generator=rng)


def _model(length, seed):
    rng = np.random.default_rng(seed)
    vectors = scipy.linalg.qr(rng.normal(size=(length, length)))[0]
    pca = {"mean": rng.normal(size=length) / 30, "eigvecs": vectors}
    pca["eigvals"] = np.geomspace(1, 1e-4, length)
    lw = {"mean": rng.normal(size=length) / 30, "eigvecs": rng.normal(size=(length, length))}
    lw["eigvals"] = np.ones(length)
    return {
        name: {k: torch.tensor(v, dtype=torch.float32) for k, v in model.items()}
        for name, model in (("pca", pca), ("lw", lw))
    }


def _save(folder, length=238):
    models = {name: _model(length, i) for i, name in enumerate(("liberty", "notredame"))}
    torch.save(models, folder / "mkd.pth")
    return folder / "mkd.pth", models


@pytest.mark.parametrize("training_set", ["liberty", "notredame"])
@pytest.mark.parametrize("kind", ["pca", "pcawt", "pcaws", "lw"])
def test_a_model_whitens_as_kornia_does(tmp_path, kind, training_set):
    mkd = pytest.importorskip("kornia.feature.mkd")
    file, models = _save(tmp_path)
    vectors = KernelDescriptor()(_patches()).vectors.float()
    theirs = mkd.Whitening(kind, models[training_set], in_dims=238, output_dims=64)
    found = whitening_from_mkd_pytorch(file, training_set, kind, dim=64)
    torch.testing.assert_close(found(vectors), theirs(vectors).detach(), rtol=0, atol=1e-5)


def test_a_model_is_what_its_numbers_say(tmp_path):
    file, models = _save(tmp_path)
    vectors = KernelDescriptor()(_patches()).vectors
    pca = {k: v.double() for k, v in models["liberty"]["pca"].items()}
    y = (vectors - pca["mean"]) @ pca["eigvecs"][:, :30] * pca["eigvals"][:30] ** -0.25
    found = whitening_from_mkd_pytorch(file, dim=30, t=0.5)
    torch.testing.assert_close(found(vectors), y / y.norm(dim=1, keepdim=True))
    lw = models["liberty"]["lw"]
    found = whitening_from_mkd_pytorch(file, kind="lw", dim=30)
    torch.testing.assert_close(found.projection, lw["eigvecs"][:, :30].double())


@pytest.mark.parametrize(("length", "kind"), [(63, "cartesian"), (175, "polar"), (238, "concat")])
def test_the_length_says_which_part_it_is_for(tmp_path, length, kind):
    file, _ = _save(tmp_path, length)
    found = whitening_from_mkd_pytorch(file)
    assert found.convention == KernelDescriptor(kind).convention
    assert found.projection.shape == (length, min(length, 128))


def test_bad_pth_files_are_refused(tmp_path):
    file, models = _save(tmp_path)
    with pytest.raises(InputError, match="no whitening"):
        whitening_from_mkd_pytorch(tmp_path / "none.pth")
    with pytest.raises(InputError, match="holds liberty, notredame"):
        whitening_from_mkd_pytorch(file, "yosemite")
    with pytest.raises(InputError, match="lws"):
        whitening_from_mkd_pytorch(file, kind="lws")
    with pytest.raises(InputError, match="one of"):
        whitening_from_mkd_pytorch(file, kind="zca")
    del models["liberty"]["pca"]["eigvals"]
    torch.save(models, file)
    with pytest.raises(InputError, match="layout"):
        whitening_from_mkd_pytorch(file)
    torch.save(
        {"liberty": {"pca": {k: torch.ones(5) for k in ("mean", "eigvecs", "eigvals")}}}, file
    )
    with pytest.raises(InputError, match="layout"):
        whitening_from_mkd_pytorch(file)
    for content in (b"", b"not a file of tensors at all", b"\x80\x02cos\nsystem\n."):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"no \.pth"):
            whitening_from_mkd_pytorch(file)


# ------------------------------------------------------------------- Matlab


def _matlab_descriptors(patches):
    """Descriptors as the Matlab code orders and signs them, by loops over the components."""
    ours = KernelDescriptor()(patches).vectors.numpy()
    theirs = np.zeros_like(ours)
    odd = {1, 3, 4, 6}  # cos 1, cos 3, sin 1, sin 3
    for start, width in ((0, 25), (175, 9)):
        for t in range(7):
            for e in range(width):
                sign = -1 if t in odd else 1
                theirs[:, start + e * 7 + t] = sign * ours[:, start + t * width + e]
    return ours, theirs


def _matlab_whiten(vectors, model, dim):
    y = (model["P"][:dim] @ (vectors - model["m"].ravel()).T).T
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def _matlab_model():
    rng = np.random.default_rng(3)
    return {"P": rng.normal(size=(238, 238)), "m": rng.normal(size=(238, 1)) / 30}


def test_the_negative_has_the_matlab_sign():
    # Their gradient is that of 1 - I: the odd harmonics of theta change sign, no others.
    patches = _patches()
    ours, theirs = _matlab_descriptors(patches)
    negative = KernelDescriptor()(1 - patches).vectors.numpy()
    reordered = np.concatenate(
        [
            negative[:, :175].reshape(-1, 7, 25).transpose(0, 2, 1).reshape(-1, 175),
            negative[:, 175:].reshape(-1, 7, 9).transpose(0, 2, 1).reshape(-1, 63),
        ],
        axis=1,
    )
    np.testing.assert_allclose(reordered, theirs, atol=1e-9)
    assert np.abs(ours - theirs).max() > 0.1


@pytest.mark.parametrize("dim", [20, 238])
def test_a_matlab_model_gives_the_same_vectors(tmp_path, dim):
    model = _matlab_model()
    scipy.io.savemat(tmp_path / "model.mat", {"cmkd": {"lw": model}})
    ours, theirs = _matlab_descriptors(_patches())
    wanted = _matlab_whiten(theirs, model, dim)
    read = scipy.io.loadmat(tmp_path / "model.mat", simplify_cells=True)
    for source in (tmp_path / "model.mat", str(tmp_path / "model.mat"), read):
        whitening = whitening_from_matlab(source, dim=dim)
        np.testing.assert_allclose(whitening(torch.from_numpy(ours)), wanted, atol=1e-9)
        assert whitening.kind == "lw"
        assert whitening.convention == KernelDescriptor().convention
    whitening.save(tmp_path / "ours.safetensors")
    assert type(whitening).load(tmp_path / "ours.safetensors").kind == "lw"


def test_bad_mat_files_are_refused(tmp_path):
    file = tmp_path / "model.mat"
    with pytest.raises(InputError, match="no whitening"):
        whitening_from_matlab(file)
    for content in (b"", b"MATLAB 5.0 MAT-file" + bytes(300), b"\x00" * 200):
        file.write_bytes(content)
        with pytest.raises(InputError, match="cmkd"):
            whitening_from_matlab(file)
    scipy.io.savemat(file, {"other": 1})
    with pytest.raises(InputError, match="cmkd"):
        whitening_from_matlab(file)
    scipy.io.savemat(file, {"cmkd": {"lw": {"P": np.eye(5), "m": np.ones(5)}}})
    with pytest.raises(InputError, match="238"):
        whitening_from_matlab(file)
    with pytest.raises(InputError, match="dim 239"):
        whitening_from_matlab({"cmkd": {"lw": _matlab_model()}}, dim=239)
    file.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(512))
    with pytest.raises(InputError, match="-v7"):
        whitening_from_matlab(file)
