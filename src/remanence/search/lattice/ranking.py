"""Words of a finite automaton as consecutive integers, and back: enumerative coding.

A code's points are the words of an automaton: it reads a coordinate at a time, and its state is
what the coordinates still to come must make up, such as the rest of the squared norm. The rank of a
word is the number of words before it: at each coordinate, those that agree so far and go on with an
earlier value. Numbers up to 2^64 are int64 less 2^63, which keeps their order; larger ones are
several integers of 48 bits, whose sums fit in int64. That is how torch counts, on any device; on
the processor `compiled` does the same with integers of 64 bits.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from numpy.typing import NDArray

    from remanence.search.lattice.compiled import Numbering

    State = TypeVar("State", bound=Hashable)

WORD = 48  # bits of each integer where one is not enough; whole bytes
HALF = -(2**63)  # what is taken off a number that is one integer, or added: the same modulo 2^64
CHUNK = 2**18  # numbers of a step held at a time


class _Tables(NamedTuple):
    """What the steps look up; all on one device."""

    before: Tensor  # (words, length, states * width): how many words go on with an earlier letter
    following: Tensor  # (states, width): the state after a letter
    letters: Tensor  # (width,)
    places: Tensor  # the place in `letters` of the lowest integer and those after it, or -1
    accepting: Tensor  # (states,)


class Ranking:
    """A bijection between the words of an automaton and 0..size - 1.

    Args:
        length: Letters of a word.
        letters: The alphabet: small integers in the order of their ranks.
        start: First state.
        step: Next state after a letter, or None where no word goes on so.
        accept: Whether a word may end in a state.
    """

    def __init__(
        self,
        length: int,
        letters: Sequence[int],
        start: State,
        step: Callable[[State, int], State | None],
        accept: Callable[[State], bool],
    ) -> None:
        states, following = _explore(length, letters, start, step)
        # counts[k][s]: words of k letters from state s, and 0 for the state that stands for none.
        counts = [[int(accept(state)) for state in states] + [0]]
        for _ in range(length):
            last = counts[-1]
            counts.append([sum(last[s] for s in row) for row in following] + [0])
        self.size: int = counts[length][0]
        self.bits = (self.size - 1).bit_length()
        self.nbytes = -(-self.bits // 8)
        words = 1 if self.bits <= 64 else -(-self.bits // WORD)
        width = 1 << (len(letters) - 1).bit_length()
        before = []  # words that go on with an earlier letter
        for i in range(length):
            later = counts[length - 1 - i]
            for row in following:
                sums = [0, *accumulate(later[s] for s in row)]
                # Sums beyond the size belong to states that no word is in here.
                sums = [min(number, self.size) for number in sums]
                before.append([sums[min(j, len(letters))] for j in range(width)])
        flat = [number for row in before for number in row]
        tables = [[_word(number, w, words) for number in flat] for w in range(words)]
        shape = (length, len(states) * width)
        none = len(states)  # the state of a word that cannot go on
        lowest = min(letters)
        places = torch.full((max(letters) - lowest + 1,), -1)
        places[torch.tensor(letters) - lowest] = torch.arange(len(letters))
        padded = [*letters, *[0] * (width - len(letters))]
        self._tables = _Tables(
            before=torch.tensor(tables).view(words, *shape),
            following=torch.tensor([row + [none] * (width - len(row)) for row in following]),
            letters=torch.tensor(padded, dtype=torch.int8),
            places=places,
            accepting=torch.tensor(counts[0][:-1], dtype=torch.bool),
        )
        self._lowest = lowest
        # None where codes of so many words are never too large.
        full = self.size == 1 << (64 if words == 1 else WORD * words)
        self._end = None if full else [_word(self.size, w, words) for w in range(words)]
        self._compiled: Numbering | None = None

    def rank(self, words: Tensor) -> Tensor:
        """Number the words.

        Args:
            words: Integers (n, length).

        Returns:
            Ranks (n, nbytes), uint8, the lowest byte first.

        Raises:
            InputError: A row is no word; the message names the first.
        """
        codes = torch.empty(len(words), self.nbytes, dtype=torch.uint8, device=words.device)
        for start in range(0, len(words), CHUNK):
            part = words[start : start + CHUNK]
            on_cpu = words.device.type == "cpu"
            numbers, bad = self._numbering().rank(part) if on_cpu else self._rank(part)
            if bad >= 0:
                raise InputError(f"row {start + bad} is no point of the code")
            codes[start : start + CHUNK] = numbers
        return codes

    def unrank(self, codes: Tensor) -> Tensor:
        """Return the words of ranks.

        Args:
            codes: Ranks (n, nbytes), uint8, the lowest byte first.

        Returns:
            Words (n, length), int8.

        Raises:
            InputError: A rank is not below the number of words; the message names the first.
        """
        if codes.ndim != 2 or codes.shape[1] != self.nbytes or codes.dtype != torch.uint8:
            raise InputError(
                f"codes {codes.dtype} {tuple(codes.shape)}: give uint8 (n, {self.nbytes})"
            )
        length = self._tables.before.shape[1]
        words = torch.empty(len(codes), length, dtype=torch.int8, device=codes.device)
        for start in range(0, len(codes), CHUNK):
            part = codes[start : start + CHUNK]
            on_cpu = codes.device.type == "cpu"
            found, bad = self._numbering().unrank(part) if on_cpu else self._unrank(part)
            if bad >= 0:
                raise InputError(
                    f"code {start + bad} is not below {self.size}: it was damaged, or written for "
                    "another code"
                )
            words[start : start + CHUNK] = found
        return words

    def _on(self, device: torch.device) -> _Tables:
        if self._tables.places.device != device:
            self._tables = _Tables(*(table.to(device) for table in self._tables))
        return self._tables

    def _numbering(self) -> Numbering:
        if self._compiled is None:
            from remanence.search.lattice.compiled import Numbering  # numba takes time to import

            tables = self._on(torch.device("cpu"))
            self._compiled = Numbering(
                self.size,
                self.nbytes,
                _limbs(tables.before, self.bits),
                tables.following.numpy(),
                tables.letters.numpy(),
                tables.places.numpy(),
                tables.accepting.numpy(),
                self._lowest,
            )
        return self._compiled

    def _bytes_of(self, w: int) -> range:
        """Return the bytes of a code that its integer w holds."""
        if len(self._tables.before) == 1:
            return range(self.nbytes)
        return range(w * WORD // 8, min((w + 1) * WORD // 8, self.nbytes))

    def _rank(self, words: Tensor) -> tuple[Tensor, int]:
        """Return the ranks and the first row that is no word, or -1."""
        codes = torch.empty(len(words), self.nbytes, dtype=torch.uint8, device=words.device)
        tables = self._on(words.device)
        span = words.long() - self._lowest
        inside = (span >= 0) & (span < len(tables.places))
        letters = tables.places[torch.where(inside, span, 0)]
        inside &= letters >= 0
        letters = torch.where(inside, letters, 0)
        bad = ~inside.all(1)
        states, width = tables.following.shape
        following = tables.following.flatten()
        state = torch.zeros_like(letters[:, 0])
        single = len(tables.before) == 1
        start_at = HALF * (words.shape[1] % 2) if single else 0  # undoes the HALF in each summand
        digits = [torch.full_like(state, start_at) for _ in tables.before]
        for i in range(words.shape[1]):
            place = state * width + letters[:, i]
            for w, table in enumerate(tables.before[:, i]):
                digits[w] += table[place]
            state = following[place]
            bad |= state == states
            state = torch.where(bad, 0, state)
        bad |= ~tables.accepting[state]
        if bool(bad.any()):
            return codes, int(bad.int().argmax())
        carry = torch.zeros_like(digits[0])
        for w, digit in enumerate(digits):
            total = digit + carry
            carry = total >> WORD
            for i, byte in enumerate(self._bytes_of(w)):
                codes[:, byte] = ((total >> (8 * i)) & 255).to(torch.uint8)
        return codes, -1

    def _unrank(self, codes: Tensor) -> tuple[Tensor, int]:
        """Return the words and the first row that is too large, or -1."""
        device = codes.device
        tables = self._on(device)
        words = torch.empty(len(codes), tables.before.shape[1], dtype=torch.int8, device=device)
        single = len(tables.before) == 1
        digits = []
        for w in range(len(tables.before)):
            digit = torch.full((len(codes),), HALF if single else 0, device=device)
            for i, byte in enumerate(self._bytes_of(w)):
                digit += codes[:, byte].long() << (8 * i)
            digits.append(digit)
        if self._end:
            beyond = _at_least(digits, [torch.full_like(digits[0], word) for word in self._end])
            if bool(beyond.any()):
                return words, int(beyond.int().argmax())
        following, width = tables.following.flatten(), tables.following.shape[1]
        state = torch.zeros_like(digits[0])
        for i in range(words.shape[1]):
            before = tables.before[:, i].unbind()
            place = state * width
            jump = width // 2
            while jump:  # the last letter with no more words before it than the rank
                further = place + jump
                fits = _at_least(digits, [table[further] for table in before])
                place = torch.where(fits, further, place)
                jump //= 2
            borrow = torch.zeros_like(state)
            for w, table in enumerate(before):
                difference = digits[w] - table[place] - borrow
                if single:
                    digits[w] = difference + HALF
                else:
                    borrow = (difference < 0).long()
                    digits[w] = difference + (borrow << WORD)
            words[:, i] = tables.letters[place % width]
            state = following[place]
        return words, -1


def _word(number: int, w: int, words: int) -> int:
    """Return one of the integers that stand for a number."""
    return number + HALF if words == 1 else (number >> (WORD * w)) & ((1 << WORD) - 1)


def _limbs(before: Tensor, bits: int) -> NDArray[np.uint64]:
    """Return numbers in the integers of `_word` (words, ...) as limbs of 64 bits (limbs, ...)."""
    if len(before) == 1:
        return before.numpy().view(np.uint64) ^ np.uint64(2**63)
    limbs = -(-bits // 64)
    pieces = before.movedim(0, -1).contiguous().view(torch.uint8)  # the lowest byte first
    used = pieces.view(*before.shape[1:], len(before), 8)[..., : WORD // 8].flatten(-2)
    filled = torch.nn.functional.pad(used, (0, max(8 * limbs - used.shape[-1], 0)))
    whole = filled[..., : 8 * limbs].contiguous().view(torch.int64)
    return whole.movedim(-1, 0).contiguous().numpy().view(np.uint64)


def _at_least(digits: list[Tensor], others: list[Tensor]) -> Tensor:
    """Compare numbers by their digits, the lowest first."""
    result = digits[0] >= others[0]
    for digit, other in zip(digits[1:], others[1:], strict=True):
        result = (digit > other) | ((digit == other) & result)
    return result


def _explore(
    length: int,
    letters: Sequence[int],
    start: State,
    step: Callable[[State, int], State | None],
) -> tuple[list[State], list[list[int]]]:
    """Return the states within `length` steps, and the number of the state after each letter.

    The number after the last stands for no state.
    """
    numbers = {start: 0}
    states = [start]
    moves: list[list[State | None]] = []
    for _ in range(length):
        for state in states[len(moves) :]:
            after = [step(state, letter) for letter in letters]
            moves.append(after)
            for new in after:
                if new is not None and new not in numbers:
                    numbers[new] = len(numbers)
        states = list(numbers)
    # States that only the last letter reaches go nowhere.
    moves += [[None] * len(letters) for _ in states[len(moves) :]]
    dead = len(states)
    return states, [[dead if new is None else numbers[new] for new in row] for row in moves]
