"""The bytes of the Open Inference Protocol: what is bounded before it is parsed, and tensors there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

pytest.importorskip("tritonclient.grpc", reason='the protocol is an extra; pip install "vaeserve[oip]"')

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from oip_calls import add, arrays, request
from vaeserve_server import oip_tensors, oip_wire, protobuf_wire
from vaeserve_server.errors import InvalidInputError

DTYPES = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1"), "FP16": np.dtype("<f2"), "UINT64": np.dtype("<u8")}
PLACES = {"FP32": "fp32_contents", "UINT8": "uint_contents", "UINT64": "uint64_contents"}
LONG = bytes(2**17)
SHAPES = some.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def tensors(*datatypes: str) -> Any:
    return st.sampled_from(datatypes).flatmap(
        lambda datatype: st.tuples(st.just(datatype), some.arrays(DTYPES[datatype], SHAPES))
    )


def read(made: Any) -> dict[str, np.ndarray]:
    parsed = service_pb2.ModelInferRequest.FromString(made.SerializeToString())
    return oip_tensors.read(parsed, ["a"], ["b"])


def field(number: int, content: bytes) -> bytes:
    return protobuf_wire.varint(number << 3 | 2) + protobuf_wire.varint(len(content)) + content


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


@settings(deadline=None)
@given(tensors(*DTYPES), tensors(*DTYPES))
def test_raw_inputs_are_read_bit_for_bit(first: Any, second: Any) -> None:
    made = request("m")
    for name, (datatype, array) in {"b": first, "a": second}.items():
        add(made, name, datatype, array.shape, array.tobytes())
    got = read(made)
    assert same_bits(got["b"], first[1])
    assert same_bits(got["a"], second[1])


@settings(deadline=None)
@given(tensors(*PLACES))
def test_typed_inputs_are_read_bit_for_bit(given_: Any) -> None:
    datatype, array = given_
    if datatype == "FP32":
        array = np.nan_to_num(array)  # which of the NaNs it was is lost on the way through Python's floats
    got = read(add(request("m"), "a", datatype, array.shape, **{PLACES[datatype]: array.ravel().tolist()}))
    assert same_bits(got["a"], array)


@settings(deadline=None)
@given(st.lists(tensors(*DTYPES), min_size=1, max_size=3), st.booleans())
def test_outputs_are_written_bit_for_bit(given_: list[Any], typed: bool) -> None:
    response = service_pb2.ModelInferResponse()
    outputs = {f"output {number}": array for number, (_, array) in enumerate(given_)}
    oip_tensors.write(response, outputs, typed=typed)
    parsed = service_pb2.ModelInferResponse.FromString(response.SerializeToString())
    assert [tensor.datatype for tensor in parsed.outputs] == [datatype for datatype, _ in given_]
    if not typed or any(datatype == "FP16" for datatype, _ in given_):
        got = arrays(parsed)
        assert all(same_bits(got[name], array) for name, array in outputs.items())
        return
    for tensor, (datatype, array) in zip(parsed.outputs, given_, strict=True):
        values = np.array(getattr(tensor.contents, PLACES[datatype]), array.dtype)
        assert np.array_equal(values, array.ravel(), equal_nan=datatype == "FP32")
        assert tuple(tensor.shape) == array.shape
        assert [field.name for field, _ in tensor.contents.ListFields()] == [PLACES[datatype]] * bool(array.size)


@pytest.mark.parametrize(
    "made",
    [
        add(request("m"), "a", "UINT8", [2**22], bytes(2**22)),
        add(request("m"), "a", "FP32", [2**20], fp32_contents=[0.5] * 2**20),
        add(request("m", "", {"seed": 7}), "a", "UINT8", [2**18], uint_contents=[255] * 2**18),
        add(add(request("m"), "a", "UINT8", [2**20], bytes(2**20)), "b", "FP16", [2**20], bytes(2**21)),
    ],
)
def test_large_tensors_pass(made: Any) -> None:
    oip_wire.check(made.SerializeToString())


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**17 - 1))
def test_what_passes_cannot_swell(noise: bytes, at: int) -> None:
    good = add(request("m"), "a", "UINT8", [2**17], LONG).SerializeToString()
    for payload in (noise + good, good[:at] + noise + good[at:], good[:at], field(5, noise) + good):
        try:
            oip_wire.check(payload)
            parsed = service_pb2.ModelInferRequest.FromString(payload)
        except (DecodeError, InvalidInputError):
            continue
        assert len(parsed.inputs) + len(parsed.raw_input_contents) + len(parsed.outputs) <= oip_wire.MAX_FIELDS
        assert len(payload) - sum(map(len, parsed.raw_input_contents)) <= oip_wire.MAX_OTHER_BYTES


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (field(5, b"") * 2**16, "more than 1024 fields"),  # empty inputs
        (field(4, b"") * 2**16, "more than 1024 fields"),  # empty parameters
        (field(7, b"") * 2**16, "more than 1024 fields"),  # empty raw contents
        (field(5, field(5, b"") * 2**16), "more than 1024 fields"),  # in an input, empty contents
        (field(5, field(5, field(6, b"") * 2**16)), "more than 1024 fields"),  # in its contents
        (field(5, b"\x18\x01" * 2**16), "more than 1024 fields"),  # a shape, an axis a field
        (field(4, field(2, b"") * 2**20), r"\d+ bytes beside raw_input_contents"),  # a parameter
        (field(5, field(3, b"\x01" * 2**20)), r"\d+ bytes beside raw_input_contents"),  # a shape
        (field(5, field(5, field(4, b"\x01" * 2**20))), r"\d+ bytes beside raw_input_contents"),  # typed bytes
    ],
)
def test_what_would_swell_is_refused(payload: bytes, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        oip_wire.check(payload)


@pytest.mark.parametrize(
    "payload",
    [
        field(7, bytes(2**17))[:-1],  # shorter than it says
        b"\x3a" + b"\xff" * 2**17,  # a length without end
        b"\x2b" + LONG,  # a group
        field(7, LONG) + b"\x3a",  # nothing after a tag
        field(5, field(7, LONG)[:-1]) + b"\x00",  # a field that ends outside its message
    ],
)
def test_what_is_no_message_is_told_apart(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        oip_wire.check(payload)


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_numbers_are_written_as_protobuf_writes_them(value: int) -> None:
    packed = service_pb2.InferTensorContents(uint64_contents=[value]).SerializeToString()
    assert protobuf_wire.varint(value) == packed[2:]
