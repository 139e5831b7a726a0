"""Plain faiss indexes of the same vectors, which give the same scores without this library.

They hold the unit vectors c / r, a byte a coordinate, and take embedded queries f(q).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from remanence.search.index.storage import CHUNK, calibrate, scalar_quantizer, stored_bytes

if TYPE_CHECKING:
    from remanence.search.index.ids import Ids
    from remanence.search.index.inverted import InvertedLists
    from remanence.search.index.storage import Storage

KIND: Any = faiss.ScalarQuantizer.QT_8bit_uniform


def flat(storage: Storage, ids: Ids) -> Any:
    """Return an IndexScalarQuantizer of all points, in an IndexIDMap2 where ids are stored."""
    index = scalar_quantizer(storage.code)
    named = index if ids.explicit is None else faiss.IndexIDMap2(index)  # takes only empty ones
    for rows in storage.chunks():
        index.add_sa_codes(stored_bytes(storage.code, storage.points(rows)))
    _name(named, index, ids)
    return named


def graph(storage: Storage, ids: Ids, neighbours: int) -> Any:
    """Return an IndexHNSWSQ of all points, which finds most of the nearest."""
    code = storage.code
    index = faiss.IndexHNSWSQ(code.dim, KIND, neighbours, faiss.METRIC_INNER_PRODUCT)
    calibrate(faiss.downcast_index(index.storage), code)
    index.is_trained = True
    named = index if ids.explicit is None else faiss.IndexIDMap2(index)
    for rows in storage.chunks():
        index.add(code.dequantize(storage.points(rows)).numpy())
    _name(named, index, ids)
    return named


def inverted(storage: Storage, ids: Ids, lists: InvertedLists) -> Any:
    """Return an IndexIVFScalarQuantizer with the same lists and the same default of `nprobe`."""
    code = storage.code
    coarse = faiss.IndexFlatIP(code.dim)
    coarse.add(lists.centroids.numpy())
    metric = faiss.METRIC_INNER_PRODUCT
    index: Any = faiss.IndexIVFScalarQuantizer(coarse, code.dim, len(lists), KIND, metric, False)
    calibrate(index, code)
    index.nprobe = lists.probes(None)
    order, ends = lists.rows()
    for number in range(len(lists)):
        for start in range(ends[number], ends[number + 1], CHUNK):
            rows = order[start : min(start + CHUNK, ends[number + 1])]
            points = stored_bytes(code, storage.points(rows))
            names = np.ascontiguousarray(ids.at(rows).numpy())
            pointers = faiss.swig_ptr(names), faiss.swig_ptr(points)
            index.invlists.add_entries(number, len(rows), *pointers)
    index.ntotal = len(storage)
    return index


def binary(storage: Storage, ids: Ids) -> Any:
    """Return an IndexBinaryFlat of the codes; its queries are codes too."""
    index = faiss.IndexBinaryFlat(8 * storage.code.nbytes)
    named = index if ids.explicit is None else faiss.IndexBinaryIDMap2(index)
    for rows in storage.chunks():
        index.add(storage.codes(rows).numpy())
    _name(named, index, ids)
    return named


def _name(named: Any, index: Any, ids: Ids) -> None:
    """Give the rows of an index their names, where it has a layer of them."""
    if named is not index:
        faiss.copy_array_to_vector(ids.at(slice(0, None)).numpy(), named.id_map)
        named.ntotal = index.ntotal
        named.construct_rev_map()
