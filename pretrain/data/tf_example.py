"""`tf.train.Example`, the record of a TFDS data set, written and read without TensorFlow.

The message is a map from names to lists: `Example{1: Features{1: repeated entry{1: name, 2: Feature}}}`, where a
`Feature` holds `1: BytesList{1: repeated bytes}` (or floats as 2, integers as 3, which text needs not). Only
length-delimited fields occur on the way to a string, so the protocol buffer wire format
(https://protobuf.dev/programming-guides/encoding/) shrinks to the functions below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

LENGTH_DELIMITED = 2
FIXED_BYTES = {1: 8, 5: 4}
"""Length of the wire types that have a fixed one."""


def encode_example(texts: Mapping[str, str]) -> bytes:
    """The serialised Example with one UTF-8 string for each name."""
    entries = b""
    for name, text in texts.items():
        feature = _field(1, _field(1, text.encode("utf-8")))
        entries += _field(1, _field(1, name.encode("utf-8")) + _field(2, feature))
    return _field(1, entries)


def decode_text(record: bytes, name: str) -> str:
    """The string called `name` in a serialised Example.

    Raises:
        ValueError: the record is not an Example, or holds no single string of that name.
    """
    wanted = name.encode("utf-8")
    try:
        for features in _fields(record, 1):
            for entry in _fields(features, 1):
                if wanted == next(_fields(entry, 1), b""):
                    (value,) = [v for f in _fields(entry, 2) for values in _fields(f, 1) for v in _fields(values, 1)]
                    return value.decode("utf-8")
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"text_column={name!r}: a record of {len(record)} bytes is not an Example with one UTF-8 string of that "
            f"name ({error}); prepare the data set again"
        ) from error
    raise ValueError(f"text_column={name!r}: a record lacks it; prepare the data set again")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | LENGTH_DELIMITED) + _varint(len(content)) + content


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def _fields(data: bytes, number: int) -> Iterator[bytes]:
    """The contents of the length-delimited fields with this number, in order; other fields are passed over."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        wire_type = tag & 7
        if wire_type == LENGTH_DELIMITED:
            length, at = _read_varint(data, at)
            if at + length > len(data):
                raise ValueError("it is cut short")
            if tag >> 3 == number:
                yield data[at : at + length]
            at += length
        elif wire_type == 0:
            _, at = _read_varint(data, at)
        elif wire_type in FIXED_BYTES:
            at += FIXED_BYTES[wire_type]
        else:
            raise ValueError(f"wire type {wire_type} is unknown")
