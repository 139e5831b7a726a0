"""An index that keeps a few bytes a vector (arXiv 1806.03198).

A transform f spreads vectors on the sphere, a code rounds them to points c of norm r, and only
their numbers are kept. Queries are not rounded: a score is the cosine f(q) . c / r. All points have
one norm, |f(q) - c / r|^2 = 2 - 2 f(q) . c / r, so that the order by score is the order by
distance.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.search.index import export, file
from remanence.search.index.hamming import hamming_search
from remanence.search.index.ids import Ids
from remanence.search.index.inverted import InvertedLists
from remanence.search.index.scan import scan, scan_lists
from remanence.search.index.storage import CHUNK, Codes, Points, Storage
from remanence.search.index.transform import Transform, check_vectors, embed
from remanence.search.lattice.sign import SignCode

if TYPE_CHECKING:
    from remanence.search.lattice.code import SphericalCode

Kind = Literal["codes", "int8"]


class SpreadIndex:
    """Vectors under ids, found again by the cosine of embeddings.

    Memory and files: `code.nbytes` bytes a vector, or `dim` in memory with int8 storage; 8 more
    once ids are not 0, 1, 2 ...; 2 or 4 more for inverted lists.

    Args:
        transform: The map to the sphere; vectors that are added and queries go through it.
        code: The code, of the transform's `out_dim`.
        storage: "codes" decodes on the fly, once for each batch of queries; "int8" holds decoded
            points, which is quicker. Results are the same.
        nlist: Number of inverted lists, of which a search looks at a few; 0 for none: a search
            looks at all vectors. Lists need `train`.
        seed: Of the k-means that `train` runs.

    Raises:
        InputError: An argument is out of range, or the dimensions differ.
    """

    def __init__(
        self,
        transform: Transform,
        code: SphericalCode,
        *,
        storage: Kind = "codes",
        nlist: int = 0,
        seed: int = 0,
    ) -> None:
        if transform.out_dim != code.dim:
            raise InputError(
                f"a code of dimension {code.dim} for a transform to {transform.out_dim}: give one "
                f"of dimension {transform.out_dim}"
            )
        if storage not in get_args(Kind):
            raise InputError(f"storage {storage!r}: give one of {', '.join(get_args(Kind))}")
        if not 0 <= nlist < 2**31:
            raise InputError(f"nlist {nlist}: give 0 or more")
        file.describe(code)  # refuses one that could not be saved
        self.transform, self.code, self.nlist, self.seed = transform, code, nlist, seed
        self.storage: Kind = storage
        self._rows: Storage = Codes(code) if storage == "codes" else Points(code)
        self._ids = Ids()
        self._lists: InvertedLists | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes that the vectors take in memory, without ids and lists."""
        return len(self) * self._rows.row_bytes

    @property
    def ids(self) -> Tensor:
        """Ids (n,), int64, in the order of insertion."""
        return self._ids.at(slice(0, len(self)))

    def train(self, vectors: Tensor) -> None:
        """Find the centroids of the inverted lists by spherical k-means on embedded vectors.

        Args:
            vectors: (n, in_dim), at least `nlist`; faiss takes up to 256 for each list.

        Raises:
            InputError: There are no lists, vectors were added before, or these are no good.
        """
        if not self.nlist or len(self):
            why = "has vectors already" if self.nlist else "has no lists"
            raise InputError(f"an index that {why} is not trained: make one with nlist, then train")
        check_vectors(self.transform, vectors)
        parts = [
            embed(self.transform, vectors[start : start + CHUNK], start).cpu()
            for start in range(0, len(vectors), CHUNK)
        ]
        embedded = torch.cat([torch.empty(0, self.code.dim), *parts])
        self._lists = InvertedLists.train(embedded, self.nlist, self.seed)

    def add(self, vectors: Tensor, ids: Tensor | None = None) -> None:
        """Add vectors; all or, after an error, none.

        Args:
            vectors: (n, in_dim), any real type, on any device; 65,536 are embedded at a time.
            ids: (n,), int64, 0 or more, each once; by default they number on from the largest that
                ever was, the first from 0.

        Raises:
            InputError: The index is not trained, a shape or type is wrong, a value is NaN or
                infinite, or an id is negative or there already.
        """
        lists = self._trained()
        check_vectors(self.transform, vectors)
        ids = self._ids.check(ids, len(vectors))
        rows, numbers = [], []
        for start in range(0, len(vectors), CHUNK):
            embedded = embed(self.transform, vectors[start : start + CHUNK], start)
            points = self.code.quantize(embedded)
            rows.append(self._rows.form(points))
            if lists is not None:
                numbers.append(lists.assign(self.code.dequantize(points).cpu()))
        for some in rows:
            self._rows.append(some)
        if lists is not None:
            for found in numbers:
                lists.append(found)
        self._ids.append(ids, len(vectors))

    def search(
        self, queries: Tensor, k: int, *, nprobe: int | None = None, symmetric: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Find the k best vectors for each query.

        Scores are computed in float64 from embedded queries and points, whatever the storage, the
        batch and the chunks in which vectors were added; of equal ones the smaller id comes first.
        At most `storage.CHUNK` vectors are decoded at a time (dim bytes each), and `topk.SCORES`
        scores held, besides the embedded queries and 24 bytes for each result.

        Args:
            queries: (q, in_dim), any real type.
            k: Number of results, at least 1.
            nprobe: Number of inverted lists to look at, 1 to nlist; all of them give what an index
                without lists gives. By default the square root of nlist, rounded up.
            symmetric: Round queries too, and count the bits in which codes differ: only with a
                `SignCode`, over all vectors. The score is 1 - 2 bits / dim, the cosine of signs.

        Returns:
            Scores (q, k), float32, falling, and ids (q, k), int64. Places that no vector was found
            for hold -inf and -1.

        Raises:
            InputError: k or nprobe is out of range, a shape or type is wrong, a value is NaN or
                infinite, or the index has lists and is not trained.
        """
        if k < 1:
            raise InputError(f"k {k}: give at least 1")
        if nprobe is not None and (symmetric or not self.nlist):
            raise InputError(f"nprobe {nprobe} without a choice of lists: leave it out")
        if symmetric and not isinstance(self.code, SignCode):
            raise InputError("symmetric search is for binary codes: make the index with a SignCode")
        lists = self._trained()
        probes = None if lists is None else lists.probes(nprobe)
        check_vectors(self.transform, queries)
        embedded = embed(self.transform, queries).cpu()
        if symmetric:
            return hamming_search(self._rows, self._ids, embedded, k)
        if lists is None or probes is None or probes == len(lists):
            return scan(self._rows, self._ids, embedded, k)
        return scan_lists(self._rows, self._ids, lists, embedded, k, probes)

    def remove(self, ids: Tensor) -> int:
        """Remove vectors; the others keep their ids, at 8 bytes each from then on.

        Args:
            ids: (m,), int64; those that are not there are passed over.

        Returns:
            How many were removed.

        Raises:
            InputError: Shape or type is wrong.
        """
        rows = self._find(ids)
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[rows[rows >= 0]] = False
        if bool(kept.all()):
            return 0
        before = len(self)
        self._rows.keep(kept)
        self._ids.keep(kept)
        if self._lists is not None:
            self._lists.keep(kept)
        return before - len(self)

    def reconstruct(self, ids: Tensor) -> Tensor:
        """Return the unit vectors c / r (m, dim), float32, under ids (m,), int64.

        Raises:
            InputError: An id is not there.
        """
        rows = self._find(ids)
        if bool((rows < 0).any()):
            raise InputError(f"there is no id {int(ids[rows.argmin()])}: give ids of the index")
        units = torch.empty(len(rows), self.code.dim)
        for start in range(0, len(rows), CHUNK):
            some = slice(start, start + CHUNK)
            units[some] = self.code.dequantize(self._rows.points(rows[some]))
        return units

    def merge(self, other: SpreadIndex) -> None:
        """Add all vectors of another index under the ids that they have there.

        Raises:
            InputError: The other has another transform or code, an id is in both, or this index is
                not trained.
        """
        lists = self._trained()
        if other.transform.digest != self.transform.digest:
            raise InputError(
                f"an index of the transform {other.transform.digest[:12]} does not go into one of "
                f"{self.transform.digest[:12]}: add its vectors anew"
            )
        mine, theirs = file.describe(self.code), file.describe(other.code)
        if mine != theirs:
            raise InputError(f"an index of the code {theirs} does not go into one of {mine}")
        ids = other.ids
        fresh = self._ids.check(ids, len(ids))
        for rows in other._rows.chunks():
            points = other._rows.points(rows)
            self._rows.append(self._rows.form(points))
            if lists is not None:
                lists.append(lists.assign(self.code.dequantize(points)))
        self._ids.append(fresh, len(ids))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file of codes, without the transform.

        A code takes its bits and no more; see `file`. A file that is there is replaced when the new
        one is whole.

        Raises:
            InputError: It cannot be written.
        """
        tensors = {"codes": self._rows.all_codes()}
        if self._ids.explicit is not None:
            tensors["ids"] = self._ids.explicit
        if self._lists is not None:
            tensors["lists"] = torch.from_numpy(self._lists.numbers)
            tensors["centroids"] = self._lists.centroids
        header = file.Header(
            transform=self.transform.digest,
            in_dim=self.transform.in_dim,
            code=file.describe(self.code),
            storage=self.storage,
            count=len(self),
            bits=self.code.bits,
            nlist=self.nlist,
            seed=self.seed,
            following=self._ids.following,
        )
        file.write(Path(path), header, tensors)

    @classmethod
    def load(cls, path: str | Path, transform: Transform) -> SpreadIndex:
        """Read what `save` wrote.

        Args:
            path: The file.
            transform: The transform that the index was made with.

        Returns:
            The index, with the storage that it had.

        Raises:
            InputError: The file is missing, damaged, or of another transform or version.
        """
        path = Path(path)
        header, code, tensors = file.read(path, transform)
        storage: Kind = "codes" if header.storage == "codes" else "int8"
        index = cls(transform, code, storage=storage, nlist=header.nlist, seed=header.seed)
        codes = tensors["codes"]
        try:
            index._rows.restore(codes)
            ids = index._ids.check(tensors.get("ids"), len(codes))
        except InputError as error:
            raise InputError(f"{path} cannot be an index: {error}") from error
        index._ids.append(ids, len(codes))
        index._ids.following = max(index._ids.following, header.following)
        if "centroids" in tensors:
            numbers = tensors["lists"].numpy()
            index._lists = InvertedLists(tensors["centroids"], numbers)
        return index

    def to_faiss(self, *, hnsw: int = 0, symmetric: bool = False) -> Any:
        """Return a plain faiss index: flat, or with the same inverted lists; see `export`.

        It takes embedded queries, `transform.embed(x)`, gives the scores of `search`, and can be
        written by `faiss.write_index`.

        Args:
            hnsw: Neighbours of a node, for a graph (IndexHNSWSQ) in place of the above; 0 for none.
            symmetric: An IndexBinaryFlat of a `SignCode`, whose queries are codes.

        Raises:
            InputError: The options do not go together or with the code.
        """
        if hnsw < 0 or hnsw == 1:
            raise InputError(f"hnsw {hnsw}: give at least 2 neighbours, or 0 for no graph")
        if symmetric and (hnsw or not isinstance(self.code, SignCode)):
            raise InputError("a binary index is flat, and of a SignCode: leave symmetric out")
        lists = self._trained()
        if symmetric:
            return export.binary(self._rows, self._ids)
        if hnsw:
            return export.graph(self._rows, self._ids, hnsw)
        if lists is not None:
            return export.inverted(self._rows, self._ids, lists)
        return export.flat(self._rows, self._ids)

    def _trained(self) -> InvertedLists | None:
        if self.nlist and self._lists is None:
            raise InputError("the inverted lists have no centroids yet: call train first")
        return self._lists

    def _find(self, ids: Tensor) -> Tensor:
        if ids.ndim != 1 or ids.dtype != torch.int64:
            raise InputError(f"ids {ids.dtype} {tuple(ids.shape)}: give int64 (m,)")
        return self._ids.rows(ids.cpu())
