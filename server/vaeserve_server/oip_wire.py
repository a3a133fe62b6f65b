"""How much a ModelInferRequest may become in memory, known before it is parsed.

Of the protocol's messages this one alone has repeated fields: 32 MiB of empty inputs would become 1.5 GB. Tensors, as
raw contents or packed floats, take in memory what they take on the wire; all the rest is bounded here.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from vaeserve_server.errors import InvalidInputError
from vaeserve_server.protobuf_wire import FIXED_BYTES, LENGTH, VARINT, WireError, read_varint

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


def check(payload: bytes) -> None:
    """Raise InvalidInputError if the message would become much larger than it is, DecodeError if it is none."""
    if len(payload) <= _HARMLESS_BYTES:
        return
    try:
        other_bytes = len(payload) - _tensor_bytes(payload)
    except IndexError:
        raise DecodeError("the message ends too early") from None
    except WireError as error:
        raise DecodeError(str(error)) from None
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
            tag, at = read_varint(payload, at)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == LENGTH:
                length, at = read_varint(payload, at)
                if (message, number) in _TENSORS:
                    tensor_bytes += length
                elif number == _INSIDE.get(message):
                    messages.append((message + 1, at, at + length))
                at += length
            elif wire_type == VARINT:
                _, at = read_varint(payload, at)
            elif wire_type in FIXED_BYTES:
                at += FIXED_BYTES[wire_type]
            else:
                raise DecodeError("groups are not taken")
        if at != end:
            raise DecodeError("a field ends outside its message")
    return tensor_bytes
