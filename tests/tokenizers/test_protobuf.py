"""Fields of a message come back as they were written, and a message cut short is refused."""

import struct

import pytest

from jaxformer.tokenizers import protobuf

VALUES = ((1, 0), (2, 127), (3, 128), (1000, 1 << 63), (4, "é▁"), (5, b""), (6, b"\0" * 300))


def test_fields_come_back_in_order():
    data = b"".join(protobuf.field(number, value) for number, value in VALUES)
    expected = [(i, v.encode() if isinstance(v, str) else v) for i, v in VALUES]
    assert list(protobuf.fields(data)) == expected


def test_a_float_is_32_bits_and_a_negative_integer_64():
    assert list(protobuf.fields(protobuf.field(1, -2.5))) == [(1, struct.pack("<f", -2.5))]
    assert list(protobuf.fields(protobuf.field(1, -1))) == [(1, (1 << 64) - 1)]
    assert list(protobuf.fields(protobuf.field(1, True))) == [(1, 1)]


@pytest.mark.parametrize(("number", "value"), [*VALUES, (7, 1.5)])
def test_a_field_cut_short_is_refused(number, value):
    data = protobuf.field(number, value)
    for size in range(1, len(data)):
        with pytest.raises(ValueError, match="byte"):
            list(protobuf.fields(data[:size]))


@pytest.mark.parametrize(
    "data", [b"\x0b", b"\x0c", b"\x0f", b"\x02\0", b"\xff" * 20, b"\x08" + b"\x80" * 20]
)
def test_what_is_no_field_is_refused(data):
    with pytest.raises(ValueError, match="byte"):
        list(protobuf.fields(data))
