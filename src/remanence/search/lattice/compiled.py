"""The codec on the processor, compiled: the results of the torch code, bit for bit, but quicker."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from remanence.kernels import in_threads, kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    Integers = NDArray[np.int64]
    Limbs = NDArray[np.uint64]

LANES = 64  # rows that take a step together, which the compiler turns into vector instructions
SHARE = 4096  # rows that are worth a thread


class Nearest:
    """The nearest point of the shell {c in Z^dim : |c|^2 = r2}.

    Falling sizes s_1 >= s_2 >= ... are matched with a leader a_1 >= a_2 >= ... Let n_v count its
    coordinates that are at least v, and P(n) be the sum of the first n sizes. The score, the sum of
    s_i a_i, is the sum of P(n_v) over the levels v = 1, 2, ..., and the squared norm that of
    (2 v - 1) n_v. For any multiplier m, P(n) - m (2 v - 1) n is concave in n; what the levels of a
    leader lose against their peaks adds up, and as all leaders have one norm, the one that loses
    least scores most. The search goes down the levels, from the largest n_v to the smallest, and
    turns back where as much is lost as by the best leader so far: some dozens of steps, however
    many leaders there are. Sizes are whole numbers, and so are losses: nothing is rounded, and of
    equal leaders the first in the order of `leaders` is found.

    Args:
        dim: Dimension.
        r2: Squared norm.
        size_bits: Bits that the largest size of a row is scaled to.
    """

    def __init__(self, dim: int, r2: int, size_bits: int) -> None:
        self._shell = (_network(dim), _squares(r2), size_bits, dim.bit_length())

    def __call__(self, x: Tensor) -> Tensor:
        """Return the points (n, dim), int8, of finite vectors (n, dim) of a floating type."""
        if x.dtype not in {torch.float32, torch.float64}:
            x = x.float()
        rows = x.detach().contiguous().numpy()
        points = np.empty(rows.shape, np.int8)

        def run(start: int, stop: int) -> None:
            _nearest(rows[start:stop], points[start:stop], *self._shell)

        in_threads(run, len(rows), len(rows) // SHARE)
        return torch.from_numpy(points)


class Numbering:
    """The numbers of an automaton's words, and back; see `ranking.Ranking`.

    Args:
        size: Number of words.
        nbytes: Bytes of a number.
        before: How many words go on with an earlier letter (limbs, length, states * width), limbs
            of 64 bits, the lowest first.
        following: The state after a letter (states, width); the number of states where there is
            none.
        letters: The alphabet (width,), int8.
        places: The place in `letters` of `lowest` and the integers after it, or -1.
        accepting: Whether a word may end in a state (states,).
        lowest: The lowest letter.
    """

    def __init__(
        self,
        size: int,
        nbytes: int,
        before: Limbs,
        following: Integers,
        letters: NDArray[np.int8],
        places: Integers,
        accepting: NDArray[np.bool_],
        lowest: int,
    ) -> None:
        limbs = len(before)
        full = size == 1 << 64 * limbs
        end = np.frombuffer(b"" if full else size.to_bytes(8 * limbs, "little"), np.uint64)
        width = len(letters)
        self._nbytes, self._length = nbytes, before.shape[1]
        self._ranks = (before, following, places, accepting, lowest)
        self._unranks = (before, (following * width).ravel(), letters, end)

    def rank(self, words: Tensor) -> tuple[Tensor, int]:
        """Return the numbers (n, nbytes), uint8, and the first row that is no word, or -1."""
        rows = (words if words.dtype == torch.int8 else words.long()).contiguous().numpy()
        codes = np.empty((len(rows), self._nbytes), np.uint8)

        def run(start: int, stop: int) -> int:
            refused = _rank(rows[start:stop], codes[start:stop], *self._ranks)
            return start + refused if refused >= 0 else -1

        return torch.from_numpy(codes), _first_refused(run, len(rows))

    def unrank(self, codes: Tensor) -> tuple[Tensor, int]:
        """Return the words (n, length), int8, and the first row that is too large, or -1."""
        rows = codes.contiguous().numpy()
        words = np.empty((len(rows), self._length), np.int8)

        def run(start: int, stop: int) -> int:
            refused = _unrank(rows[start:stop], words[start:stop], *self._unranks)
            return start + refused if refused >= 0 else -1

        return torch.from_numpy(words), _first_refused(run, len(rows))


def _first_refused(run: Callable[[int, int], int], rows: int) -> int:
    """Return the first row that a stretch refuses, or -1."""
    return next((row for row in in_threads(run, rows, rows // SHARE) if row >= 0), -1)


def _network(n: int) -> Integers:
    """List the comparisons that sort n keys: Batcher's merge exchange (Knuth, 5.2.2, M)."""
    pairs = []
    highest = 1 << max((n - 1).bit_length() - 1, 0)
    p = highest
    while p:
        q, r, apart = highest, 0, p
        while apart:
            pairs += [(i, i + apart) for i in range(n - apart) if i & p == r]
            apart, q, r = q - p, q >> 1, p
        p >>= 1
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _squares(r2: int) -> NDArray[np.bool_]:
    """Tell which numbers up to r2 are sums of k squares, k = 0..4; with four, all are."""
    sums = np.zeros((5, r2 + 1), dtype=np.bool_)
    sums[0, 0] = True
    for k in range(1, 5):
        for value in range(math.isqrt(r2) + 1):
            sums[k, value**2 :] |= sums[k - 1, : r2 + 1 - value**2]
    return sums


@kernel
def _sort(
    x: NDArray[Any],
    start: int,
    rows: int,
    keys: Integers,
    network: Integers,
    size_bits: int,
    place_bits: int,
) -> None:
    """Fill the columns of keys with the falling sizes of rows, each above its place from behind."""
    d = len(keys)
    for row in range(rows):
        largest = 0.0
        for i in range(d):
            largest = max(largest, abs(np.float64(x[start + row, i])))
        power = size_bits - math.frexp(largest)[1]
        half = math.ldexp(1.0, power >> 1)  # a double may not hold the whole power
        other = math.ldexp(1.0, power - (power >> 1))
        for i in range(d):
            size = np.rint(abs(np.float64(x[start + row, i])) * half * other)
            keys[i, row] = (np.int64(size) << place_bits) | (d - 1 - i)
    for pair in range(len(network)):
        i, j = network[pair, 0], network[pair, 1]
        for row in range(LANES):
            a, b = keys[i, row], keys[j, row]
            keys[i, row] = max(a, b)
            keys[j, row] = min(a, b)


@kernel
def _find_peaks(s: Integers, r2: int, peaks: Integers) -> int:
    """Return the multiplier whose peaks, which are found too, come closest to the norm."""
    d, top = len(s), len(peaks) - 2
    energy = 0.0
    for j in range(d):
        energy += np.float64(s[j]) * np.float64(s[j])
    step = 0.515 * math.sqrt(energy / r2)
    total = r2 + 1
    while total > r2:  # round to the norm or less, ...
        total = n = 0
        for v in range(top, 0, -1):
            while n < d and s[n] > step * (2 * v - 1):
                n += 1
            peaks[v] = n
            total += (2 * v - 1) * n
        step *= 1.04
    gain = 0.0
    while total <= r2:  # ... then raise the level that gains most for its norm
        gain, raised = 0.0, 0
        for v in range(1, top + 1):
            if peaks[v] < d and s[peaks[v]] > gain * (2 * v - 1):
                gain, raised = s[peaks[v]] / (2 * v - 1), v
        if raised == 0:
            break
        total += 2 * raised - 1
        peaks[raised] += 1
    m = int(gain)
    for v in range(1, top + 1):
        while peaks[v] < d and s[peaks[v]] > m * (2 * v - 1):
            peaks[v] += 1
        while peaks[v] > 0 and s[peaks[v] - 1] < m * (2 * v - 1):
            peaks[v] -= 1
    return m


@kernel
def _descend(
    sums: Integers,
    m: int,
    limit: int,
    squares: NDArray[np.bool_],
    peaks: Integers,
    losses: Integers,
    rest: Integers,
    levels: Integers,
    best: Integers,
) -> bool:
    """Find the leader that loses least, if one loses less than the limit."""
    d, top = len(sums) - 1, len(peaks) - 2
    found = False
    down = True
    v = top
    n = 0
    while v <= top:
        weight = 2 * v - 1
        peak = losses[v] + sums[peaks[v]] - m * weight * peaks[v]
        if down:  # to the largest n that the norm and the limit allow
            n = max(peaks[v], levels[v + 1])
            while (
                n < d
                and v * v * (n + 1) <= rest[v]
                and peak - sums[n + 1] + m * weight * (n + 1) < limit
            ):
                n += 1
            down = False
        loss = peak - sums[n] + m * weight * n
        left = rest[v] - weight * n
        below = (v - 1) * (v - 1)
        if n < levels[v + 1] or left > below * d or (loss >= limit and n <= peaks[v]):
            v += 1  # a smaller n would be no better
            n = levels[v] - 1
        elif v * v * n > rest[v] or loss >= limit or not squares[min(d - n, 4), left - below * n]:
            n -= 1
        elif v > 2:
            levels[v] = n
            v -= 1
            losses[v], rest[v] = loss, left
            down = True
        else:  # the lowest level takes what is left
            loss += sums[peaks[1]] - sums[left] - m * (peaks[1] - left)
            if loss < limit:
                limit, found = loss, True
                levels[1], levels[2] = left, n
                for u in range(top + 1):
                    best[u] = levels[u]
            n -= 1
    return found


@kernel
def _nearest(
    x: NDArray[Any],
    points: NDArray[np.int8],
    network: Integers,
    squares: NDArray[np.bool_],
    size_bits: int,
    place_bits: int,
) -> None:
    d = x.shape[1]
    r2 = squares.shape[1] - 1
    top = max(int(math.sqrt(r2 + 0.5)), 2)
    mask = (1 << place_bits) - 1
    keys = np.zeros((d, LANES), np.int64)
    s = np.zeros(d, np.int64)
    sums = np.zeros(d + 1, np.int64)
    # By level: the n of the peak, what the levels above have lost, the norm that they have left,
    # the n tried, and those of the best leader so far.
    peaks = np.zeros(top + 2, np.int64)
    losses = np.zeros(top + 2, np.int64)
    rest = np.zeros(top + 2, np.int64)
    levels = np.zeros(top + 2, np.int64)
    best = np.zeros(top + 2, np.int64)
    rest[top] = r2
    for start in range(0, len(x), LANES):
        rows = min(LANES, len(x) - start)
        _sort(x, start, rows, keys, network, size_bits, place_bits)
        for row in range(rows):
            for j in range(d):
                s[j] = keys[j, row] >> place_bits
                sums[j + 1] = sums[j] + s[j]
            m = _find_peaks(s, r2, peaks)
            limit = max(3 * m // 10, 1)
            while not _descend(sums, m, limit, squares, peaks, losses, rest, levels, best):
                limit *= 2
            v = top
            for j in range(d):
                while v > 0 and best[v] <= j:
                    v -= 1
                i = d - 1 - (keys[j, row] & mask)
                points[start + row, i] = -v if x[start + row, i] < 0 else v


@kernel
def _rank(
    words: NDArray[Any],
    codes: NDArray[np.uint8],
    before: Limbs,
    following: Integers,
    places: Integers,
    accepting: NDArray[np.bool_],
    lowest: int,
) -> int:
    limbs, length, _ = before.shape
    states, width = following.shape
    digits = np.zeros(limbs, np.uint64)
    for row in range(len(words)):
        for k in range(limbs):
            digits[k] = 0
        state = 0
        for i in range(length):
            letter = np.int64(words[row, i])
            if state == states or letter < lowest or letter >= lowest + len(places):
                return row
            letter = places[letter - lowest]
            if letter < 0:
                return row
            carry = np.uint64(0)
            for k in range(limbs):
                term = before[k, i, state * width + letter]
                total = digits[k] + term
                digits[k] = total + carry
                carry = np.uint64(total < term) | np.uint64(digits[k] < total)
            state = following[state, letter]
        if state == states or not accepting[state]:
            return row
        for b in range(codes.shape[1]):
            codes[row, b] = digits[b >> 3] >> np.uint64(8 * (b & 7))
    return -1


@kernel
def _unrank(
    codes: NDArray[np.uint8],
    words: NDArray[np.int8],
    before: Limbs,
    after: Integers,
    letters: NDArray[np.int8],
    end: Limbs,
) -> int:
    limbs, length, _ = before.shape
    width = len(letters)
    digits = np.zeros((limbs, LANES), np.uint64)
    place = np.zeros(LANES, np.int64)
    less = np.zeros(LANES, np.int64)
    for start in range(0, len(codes), LANES):
        rows = min(LANES, len(codes) - start)
        for row in range(LANES):
            place[row] = 0
            for k in range(limbs):
                digits[k, row] = 0
        for row in range(rows):
            for b in range(codes.shape[1]):
                digits[b >> 3, row] |= np.uint64(codes[start + row, b]) << np.uint64(8 * (b & 7))
            inside = len(end) == 0
            for k in range(len(end)):
                inside = digits[k, row] < end[k] or (digits[k, row] == end[k] and inside)
            if not inside:
                return start + row
        for i in range(length):
            jump = width >> 1
            while jump:  # the last letter with no more words before it than the number
                for row in range(LANES):
                    less[row] = digits[0, row] < before[0, i, place[row] + jump]
                for k in range(1, limbs):
                    for row in range(LANES):
                        digit, term = digits[k, row], before[k, i, place[row] + jump]
                        less[row] = (digit < term) | ((digit == term) & less[row])
                for row in range(LANES):
                    place[row] += jump * (1 - less[row])
                jump >>= 1
            for row in range(LANES):
                less[row] = 0
            for k in range(limbs):  # less, with a borrow
                for row in range(LANES):
                    digit, term = digits[k, row], before[k, i, place[row]]
                    digits[k, row] = digit - term - np.uint64(less[row])
                    less[row] = (digit < term) | ((digit == term) & less[row])
            for row in range(rows):
                words[start + row, i] = letters[place[row] & (width - 1)]
            for row in range(LANES):
                place[row] = after[place[row]]
    return -1
