"""Bit streams against a definition in plain Python, and round trips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.compress.storage import packing
from remanence.compress.storage.packing import pack, unpack
from remanence.errors import InputError


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 16), data=st.data())
def test_the_stream_is_one_large_little_endian_number(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=60))
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    expected = number.to_bytes((len(codes) * bits + 7) // 8, "little")
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == expected
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 17))
def test_round_trip_over_several_chunks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK", 1 << 10)
    codes = torch.randint(1 << bits, (77, 53))
    codes[0, 0], codes[-1, -1] = 0, (1 << bits) - 1
    packed = pack(codes, bits)
    assert len(packed) == (codes.numel() * bits + 7) // 8
    decoded = unpack(packed, bits, codes.numel())
    assert decoded.dtype == torch.int64
    assert torch.equal(decoded, codes.flatten())


def test_eight_bits_are_bytes() -> None:
    codes = torch.randint(256, (1000,))
    assert torch.equal(pack(codes, 8).long(), codes)


@pytest.mark.parametrize(("code", "bits"), [(256, 8), (-1, 8), (2, 1), (65_536, 16), (-1, 16)])
def test_codes_that_do_not_fit_are_refused_not_wrapped(code: int, bits: int) -> None:
    with pytest.raises(InputError, match="do not fit"):
        pack(torch.tensor([0, code]), bits)


def test_bad_streams_are_refused() -> None:
    packed = pack(torch.arange(9), 5)
    for wrong in (packed[:-1], torch.cat([packed, packed]), packed.int(), packed[None]):
        with pytest.raises(InputError, match="fill 6 bytes"):
            unpack(wrong, 5, 9)
    for bits in (0, 17):
        with pytest.raises(InputError, match="1 to 16"):
            unpack(packed, bits, 9)
        with pytest.raises(InputError, match="1 to 16"):
            pack(torch.arange(2), bits)
    with pytest.raises(InputError):
        unpack(packed, 5, -1)
