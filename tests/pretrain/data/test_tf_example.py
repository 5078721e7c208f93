import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.tf_example import decode_text, encode_example

# Example{1: Features{1: entry{1: "t", 2: Feature{1: BytesList{1: "hi"}}}}}, written out by hand from the inside:
# BytesList is 0a 02 'hi', 4 bytes; Feature 0a 04 and that, 6; entry 0a 01 't' 12 06 and that, 11; Features 0a 0b and
# that, 13.
BY_HAND = bytes.fromhex("0a0d0a0b0a017412060a040a02") + b"hi"


def test_encoding_is_the_protocol_buffer_written_by_hand():
    assert encode_example({"t": "hi"}) == BY_HAND
    assert decode_text(BY_HAND, "t") == "hi"


@pytest.mark.parametrize("other", ["48ff01", "49" + "ab" * 8, "4d" + "ab" * 4, "4a020a02"])
def test_fields_of_other_kinds_are_passed_over(other):
    # Field 9 as a varint (255), as 8 bytes, as 4 bytes, and as 2 bytes with their length before them.
    assert decode_text(bytes.fromhex(other) + BY_HAND, "t") == "hi"


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=300), min_size=1, max_size=4))
def test_tensorflow_datasets_own_message_reads_and_writes_the_same(texts):
    tf_example = pytest.importorskip("tensorflow_datasets.proto").tf_example_pb2
    message = tf_example.Example.FromString(encode_example(texts))
    assert {name: f.bytes_list.value[0].decode() for name, f in message.features.feature.items()} == texts
    message.features.feature["number"].int64_list.value.extend([1, 2**40, -1])
    message.features.feature["real"].float_list.value.extend([0.5])
    record = message.SerializeToString()
    for name, text in texts.items():
        if name not in ("number", "real"):
            assert decode_text(record, name) == text


@pytest.mark.parametrize(
    ("record", "column"),
    [
        (BY_HAND, "text"),
        (BY_HAND[:-1], "t"),
        (b"", "t"),
        (b"\xff" * 8, "t"),
        (BY_HAND[:-2] + b"\xff\xff", "t"),
    ],
    ids=["other column", "cut short", "empty", "no message", "not UTF-8"],
)
def test_records_without_the_text_are_refused(record, column):
    with pytest.raises(ValueError, match=rf"text_column='{column}': .*; prepare the data set again"):
        decode_text(record, column)
