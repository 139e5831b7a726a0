import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.decomposition import PCA

from remanence.errors import InputError
from remanence.search import rivals as rivals_file
from remanence.search.catalyzer.linear import PcaTransform
from remanence.search.exact import exact_neighbours, recall_at
from remanence.search.lattice.sphere import SphereLattice
from remanence.search.rivals import Rival, caveat, rivals, run_rival

DIM, B = 32, 4
KEYS = [
    "PQ4",
    "OPQ4_16,PQ4",
    "RQ4x8",
    "LSQ4x8",
    "ITQ32,LSH",
    "PCA12,lattice56",
    "PCA16,lattice21",
]


def vectors(n, seed):
    """Clusters with a falling spectrum, which codes can use."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(30, DIM)) * 2
    noise = rng.normal(size=(n, DIM)) * np.geomspace(2, 0.1, DIM)
    return (centres[rng.integers(30, size=n)] + noise + 3).astype("f4")


TRAIN, BASE, QUERIES = vectors(400, 0), vectors(2000, 1), vectors(40, 2)
TRUTH = exact_neighbours(QUERIES, BASE, 1)[0]


@pytest.fixture(scope="module")
def found():
    return {key: run_rival(key, TRAIN, BASE, QUERIES, 100, threads=1) for key in KEYS}


def brute(decoded, queries, k):
    return exact_neighbours(queries, decoded, k)[0]


def same_up_to_ties(one, other, decoded, queries):
    """Equal codes decode to equal vectors, which either search may order as it likes."""
    costs = [((queries[:, None].astype("f8") - decoded[ids]) ** 2).sum(-1) for ids in (one, other)]
    np.testing.assert_allclose(*costs, rtol=1e-5)


def test_the_list_names_all_that_fit():
    assert [rival.key for rival in rivals(DIM, B)] == [
        "PQ4",
        "OPQ4_32,PQ4",
        "OPQ4_16,PQ4",
        "RQ4x8",
        "LSQ4x8",
        "ITQ32,LSH",
        "PCA16,lattice21",
        "PCA12,lattice56",
    ]
    keys = [rival.key for rival in rivals(128, 8)]
    assert keys[:4] == ["PQ8", "OPQ8_128,PQ8", "OPQ8_64,PQ8", "OPQ8_32,PQ8"]
    assert keys[-2:] == ["PCA32,lattice36", "PCA24,lattice79"]
    assert "PQ8" not in [rival.key for rival in rivals(100, 8)]
    assert Rival("OPQ to 96", "OPQ8_96,PQ8") in rivals(100, 8)
    assert [rival.key for rival in rivals(2, 8)] == ["RQ8x8", "LSQ8x8"]
    with pytest.raises(InputError, match="at least 1"):
        rivals(0, 8)


@given(st.integers(1, 100), st.integers(1, 9))
@settings(max_examples=10, deadline=None)
def test_what_is_listed_can_be_opened(dim, nbytes):
    for rival in rivals(dim, nbytes):
        if "lattice" not in rival.key:
            assert faiss.index_factory(dim, rival.key).sa_code_size() == nbytes


@pytest.mark.parametrize("key", KEYS)
def test_each_takes_exactly_its_bytes(found, key):
    assert found[key].bytes_a_vector == B
    assert found[key].n_train == 400
    assert found[key].ids.shape == (40, 100)
    assert found[key].ids.dtype == np.int64
    assert min(found[key].train_seconds, found[key].encode_seconds, found[key].search_seconds) > 0


def test_models_are_counted(found):
    def size(*shape):
        return 4 * np.prod(shape)

    for key, floats in {
        "PQ4": size(256, 32),
        "OPQ4_16,PQ4": size(256, 16) + size(32, 16),
        "RQ4x8": size(4, 256, 32),
        "LSQ4x8": size(4, 256, 32),
    }.items():
        assert floats <= found[key].model_bytes <= floats + 400
    assert found["PCA12,lattice56"].model_bytes == size(32) + size(32, 12)


@pytest.mark.parametrize("key", KEYS)
def test_each_finds_far_more_than_chance(found, key):
    assert recall_at(found[key].ids, TRUTH)[100] > 0.5  # chance: 0.05
    assert len(set(found[key].ids[0])) == 100


@pytest.mark.parametrize("key", ["RQ4x8", "LSQ4x8"])
def test_additive_search_is_faisss_own_and_brute_force(found, key):
    index = faiss.index_factory(DIM, key)
    quantizer = index.rq if key.startswith("RQ") else index.lsq
    assert quantizer.search_type == faiss.AdditiveQuantizer.ST_decompress
    index.train(TRAIN)
    index.add(BASE)
    decoded = index.reconstruct_n(0, len(BASE))
    for ids in (index.search(QUERIES, 100)[1], brute(decoded, QUERIES, 100)):
        same_up_to_ties(found[key].ids, ids, decoded, QUERIES)


@pytest.mark.parametrize("key", ["PQ4", "OPQ4_16,PQ4", "ITQ32,LSH"])
def test_the_rest_of_faiss_is_its_factory(found, key):
    # "np": not polysemous, which takes seconds and renumbers centroids only.
    index = faiss.index_factory(DIM, key if key.endswith("LSH") else f"{key}np")
    index.train(TRAIN)
    index.add(BASE)
    np.testing.assert_array_equal(found[key].ids, index.search(QUERIES, 100)[1])


def test_the_lattice_ranks_decoded_vectors_against_plain_queries(found):
    pca = PcaTransform.fit(torch.from_numpy(TRAIN), 16)
    code = SphereLattice(16, 21)
    decoded = code.decode(code.encode(pca.embed(torch.from_numpy(BASE)))).numpy()
    queries = pca.embed(torch.from_numpy(QUERIES)).numpy()
    ids = brute(decoded, queries, 100)
    same_up_to_ties(found["PCA16,lattice21"].ids, ids, decoded, queries)


def test_small_chunks_change_nothing(found, monkeypatch):
    monkeypatch.setattr("remanence.search.rivals.ROWS", 64)  # fewer than k
    for key in ("PCA16,lattice21", "RQ4x8"):
        again = run_rival(key, TRAIN, BASE, QUERIES, 100, threads=1)
        assert (again.ids == found[key].ids).mean() > 0.99  # ties may swap
        assert again.bytes_a_vector == B


def test_all_training_vectors_are_used():
    # Of 65,736 vectors faiss would sample 65,536, and learn other codewords.
    train = np.random.default_rng(0).normal(size=(65_736, 2)).astype("f4")
    index = faiss.index_factory(2, "PQ1np")
    index.pq.cp.max_points_per_centroid = 257
    index.train(train)
    index.add(train[:500])
    ours = run_rival("PQ1", train, train[:500], train[:20], 5, threads=1)
    np.testing.assert_array_equal(ours.ids, index.search(train[:20], 5)[1])


def test_threads_are_given_back_and_nothing_is_printed(capfd):
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    told = []
    for key, threads in (("PQ4", 1), ("RQ4x8", 1), ("PCA16,lattice21", 2)):
        run_rival(
            key, TRAIN, BASE, QUERIES, 5, threads=threads, progress=lambda *now: told.append(now)
        )
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == before
    assert capfd.readouterr() == ("", "")
    one = [("train", 0, 400), ("train", 400, 400), ("encode", 0, 2000), ("encode", 2000, 2000)]
    assert told == 3 * [*one, ("search", 0, 40), ("search", 40, 40)]


def test_bad_input_is_refused():
    bad = BASE.copy()
    bad[12, 0] = np.inf
    for key, arguments, words in [
        ("PQ5", (TRAIN, BASE, QUERIES, 5), "PQ5: does not fit vectors of dimension 32"),
        ("IVF10,Flat", (TRAIN, BASE, QUERIES, 5), "rival 'IVF10,Flat'"),
        ("PCA40,lattice2", (TRAIN, BASE, QUERIES, 5), "more than the 32 dimensions"),
        ("PQ4", (TRAIN[:255], BASE, QUERIES, 5), "255 training vectors"),
        ("PQ4", (TRAIN, BASE[:, :16], QUERIES, 5), "dimensions 32, 16 and 32"),
        ("PQ4", (TRAIN, BASE, QUERIES, 2001), "2001 of 2000"),
        ("PQ4", (TRAIN, BASE, QUERIES, 0), "0 of 2000"),
        ("PQ4", (TRAIN, bad, QUERIES, 5), "base row 12 holds NaN"),
        ("PQ4", (TRAIN, BASE, QUERIES[0], 5), "query vectors of shape"),
    ]:
        with pytest.raises(InputError, match=words):
            run_rival(key, *arguments, threads=1)


def test_what_faiss_refuses_is_a_line_and_what_breaks_otherwise_is_not(monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(rivals_file, "CENTROIDS", 1)
    with pytest.raises(InputError, match=r"PQ4: faiss refuses: .*points \(100\)") as error:
        run_rival("PQ4", TRAIN[:100], BASE, QUERIES, 5, threads=1)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(rivals_file, "_search_decoded", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run_rival("PCA16,lattice21", TRAIN, BASE, QUERIES, 5, threads=1)


def test_lsq_from_few_vectors_is_told():
    """And is as bad as told, for want of vectors alone: by heart it knows those it learned from."""
    assert "of 4 bytes learns 10,239 vectors by heart" in caveat("LSQ4x8", 10_239)
    assert caveat("LSQ4x8", 10_240) == caveat("RQ4x8", 300) == caveat("PQ4", 300) == ""
    learn, base = (
        np.random.default_rng(seed).normal(size=(600, 8)).astype("f4") for seed in (0, 1)
    )
    index = faiss.index_factory(8, "LSQ2x8")
    index.train(learn)
    errors = {}
    for name, x in (("learn", learn), ("base", base)):
        errors[name] = np.square(index.sa_decode(index.sa_encode(x)) - x).sum(1).mean()
    assert errors["base"] > 1.5 * errors["learn"]


# The linear map


def test_pca_is_scikit_learns():
    new = vectors(50, 3)
    for kept in (1, 5, DIM):
        wanted = PCA(kept, svd_solver="full").fit(TRAIN.astype("f8")).transform(new)
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        transform = PcaTransform.fit(torch.from_numpy(TRAIN), kept)
        found = transform.embed(torch.from_numpy(new))
        assert (transform.in_dim, transform.out_dim, found.dtype) == (DIM, kept, torch.float32)
        np.testing.assert_allclose(found.abs().numpy(), np.abs(wanted), atol=2e-5)
        np.testing.assert_allclose(found.norm(dim=1).numpy(), 1, rtol=1e-6)
        signs = transform.projection.gather(0, transform.projection.abs().argmax(0, keepdim=True))
        assert (signs > 0).all()


def test_chunks_change_nothing_of_the_map(monkeypatch):
    whole = PcaTransform.fit(torch.from_numpy(TRAIN), 8)
    monkeypatch.setattr("remanence.search.catalyzer.linear.ROWS", 7)
    parts = PcaTransform.fit(torch.from_numpy(TRAIN), 8)
    torch.testing.assert_close(parts.projection, whole.projection)
    new = torch.from_numpy(vectors(50, 3))
    torch.testing.assert_close(parts.embed(new), whole.embed(new), atol=1e-5, rtol=0)


def test_saved_and_loaded_it_is_the_same_and_keeps_its_digest(tmp_path):
    transform = PcaTransform.fit(torch.from_numpy(TRAIN), 8)
    transform.save(tmp_path / "a")
    again = PcaTransform.load(tmp_path / "a")
    assert again.digest == transform.digest
    assert len(again.digest) == 64
    x = torch.from_numpy(QUERIES)
    assert torch.equal(again.embed(x), transform.embed(x))
    assert PcaTransform.fit(torch.from_numpy(TRAIN), 7).digest != transform.digest
    assert PcaTransform(transform.mean + 1e-3, transform.projection).digest != transform.digest


def test_a_file_that_is_no_pca_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such PCA"):
        PcaTransform.load(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"junk")
    tensors = {"mean": torch.zeros(3), "projection": torch.zeros(3, 2)}
    save_file(tensors, tmp_path / "b")
    save_file({"mean": torch.zeros(3)}, tmp_path / "c")
    bad = PcaTransform(**tensors)
    bad.mean = torch.full((3,), torch.nan)
    bad.save(tmp_path / "d")
    for name in "abcd":
        with pytest.raises(InputError, match="is not a PCA"):
            PcaTransform.load(tmp_path / name)


def test_a_pca_of_nothing_is_refused():
    x = torch.from_numpy(TRAIN)
    for arguments, words in [
        ((x, 33), "33 directions"),
        ((x, 0), "0 directions"),
        ((x[:1], 1), "give at least 2"),
        ((torch.ones(9, 3), 2), "all the same"),
        ((torch.full((9, 3), torch.nan), 2), "hold NaN"),
    ]:
        with pytest.raises(InputError, match=words):
            PcaTransform.fit(*arguments)
    transform = PcaTransform.fit(x, 3)
    with pytest.raises(InputError, match=r"give \(n, 32\)"):
        transform.embed(x[:, :5])
    broken = x.clone()
    broken[5, 5] = torch.inf
    with pytest.raises(InputError, match="row 5 holds NaN"):
        transform.embed(broken)
    assert transform.embed(x[:0]).shape == (0, 3)
    assert not transform.embed(transform.mean.unsqueeze(0)).any()
