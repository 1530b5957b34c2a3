"""The wire format of protocol buffers, as far as a SentencePiece model needs it."""

import struct
from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types; the two others are groups, which have long gone out of use."""


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the number and value of each field: integers of varints, raw bytes of all else.

    Raises:
        ValueError: If a field is cut short, or is of a type that does not exist.

    References:
        https://protobuf.dev/programming-guides/encoding/
    """
    position = 0
    while position < len(data):
        start = position
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == BYTES:
            size, position = _varint(data, position)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"byte {start} begins a field of the wire type {wire}")
        if number == 0 or position + size > len(data):
            raise ValueError(f"the field at byte {start} is cut short or no field")
        yield number, data[position : position + size]
        position += size


def field(number: int, value: int | bool | float | str | bytes) -> bytes:
    """Writes one field: an integer as a varint, a float in 32 bits, text and messages as bytes."""
    if isinstance(value, int):
        # A negative integer is written as the 64 bits of its two's complement.
        return _to_varint(number << 3 | VARINT) + _to_varint(int(value) % (1 << 64))
    if isinstance(value, float):
        return _to_varint(number << 3 | FIXED32) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return _to_varint(number << 3 | BYTES) + _to_varint(len(data)) + data


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    for at in range(position, min(position + 10, len(data))):
        value |= (data[at] & 0x7F) << shift
        if data[at] < 0x80:
            return value, at + 1
        shift += 7
    raise ValueError(f"the integer at byte {position} does not end")


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
