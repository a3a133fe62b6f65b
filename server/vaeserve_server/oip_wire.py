"""How much a ModelInferRequest may become in memory, known before it is parsed.

Of the protocol's messages this one alone has repeated fields: 32 MiB of empty inputs would become 1.5 GB. Tensors, as
raw contents or packed floats, take in memory what they take on the wire; all the rest is bounded here.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from vaeserve_server.errors import InvalidInputError

MAX_FIELDS = 1024
MAX_OTHER_BYTES = 2**20

_HARMLESS_BYTES = 2**16  # become 3 MB at most
_REQUEST, _INPUT, _CONTENTS = range(3)
_INSIDE = {
    _REQUEST: pb.ModelInferRequest.INPUTS_FIELD_NUMBER,
    _INPUT: pb.ModelInferRequest.InferInputTensor.CONTENTS_FIELD_NUMBER,
}
_TENSORS = {
    (_REQUEST, pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER),
    (_CONTENTS, pb.InferTensorContents.FP32_CONTENTS_FIELD_NUMBER),
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}


def check(payload: bytes) -> None:
    """Raise InvalidInputError if the message would become much larger than it is, DecodeError if it is none."""
    if len(payload) <= _HARMLESS_BYTES:
        return
    try:
        other_bytes = len(payload) - _tensor_bytes(payload)
    except IndexError:
        raise DecodeError("the message ends too early") from None
    if other_bytes > MAX_OTHER_BYTES:
        raise InvalidInputError(
            "",
            f"the request has {other_bytes} bytes beside raw_input_contents and fp32_contents; at most "
            f"{MAX_OTHER_BYTES} are taken: send large tensors as raw_input_contents",
        )


def _tensor_bytes(payload: bytes) -> int:
    tensor_bytes = fields = 0
    messages = [(_REQUEST, 0, len(payload))]
    while messages:
        message, at, end = messages.pop()
        while at < end:
            fields += 1
            if fields > MAX_FIELDS:
                raise InvalidInputError("", f"the request has more than {MAX_FIELDS} fields in its tensors")
            tag, at = _varint(payload, at)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == _BYTES:
                length, at = _varint(payload, at)
                if (message, number) in _TENSORS:
                    tensor_bytes += length
                elif number == _INSIDE.get(message):
                    messages.append((message + 1, at, at + length))
                at += length
            elif wire_type == _VARINT:
                _, at = _varint(payload, at)
            elif wire_type in _FIXED_BYTES:
                at += _FIXED_BYTES[wire_type]
            else:
                raise DecodeError("groups are not taken")
        if at != end:
            raise DecodeError("a field ends outside its message")
    return tensor_bytes


def _varint(payload: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at`, and where it ends."""
    value = shift = 0
    while True:
        byte = payload[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise DecodeError("a number has no end")


def varint(value: int) -> bytes:
    """Return a number as it stands on the wire."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
