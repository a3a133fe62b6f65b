"""The search for tensors outside an ONNX file: it finds them wherever they hide, and no bytes break it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bundles import encoder
from vaeserve_server.external_data import external_tensor

SOUND = encoder((1, 4, 4), (3,))


def outside(name: str = "w") -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), name)
    onnx.external_data_helper.set_external_data(tensor, "elsewhere.bin")
    return tensor


def hidden_in_initialiser(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(outside())


def hidden_in_attribute(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=outside()))


def hidden_in_subgraph(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [], [outside()])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=body, else_branch=body))


def hidden_in_function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=outside())
    model.functions.append(helper.make_function("local", "f", [], ["c"], [node], []))


def hidden_in_sparse(model: onnx.ModelProto) -> None:
    indices = numpy_helper.from_array(np.zeros(2, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(outside(), indices, [4]))


def hidden_without_location(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), "w")
    tensor.external_data.add(key="location", value="elsewhere.bin")  # data_location left at its default
    model.graph.initializer.append(tensor)


def hidden_at_an_address(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), "w")
    onnx.external_data_helper.set_external_data(tensor, "*/_ORT_MEM_ADDR_/*", offset=4096, length=8)
    model.graph.initializer.append(tensor)


@pytest.mark.parametrize(
    "hide",
    [
        hidden_in_initialiser,
        hidden_in_attribute,
        hidden_in_subgraph,
        hidden_in_function,
        hidden_in_sparse,
        hidden_without_location,
        hidden_at_an_address,
    ],
)
def test_a_tensor_outside_is_found(hide: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(SOUND)
    assert external_tensor(model.SerializeToString()) is None
    hide(model)
    assert external_tensor(model.SerializeToString()) == "w"


@given(data=st.binary(max_size=60))
def test_arbitrary_bytes_are_searched_or_refused(data: bytes) -> None:
    _search(data)


@given(position=st.integers(0, 10**6), value=st.integers(0, 255), length=st.integers(0, 10**6))
def test_damaged_graphs_are_searched_or_refused(position: int, value: int, length: int) -> None:
    data = bytearray(SOUND.SerializeToString())
    data[position % len(data)] = value
    _search(bytes(data[: length % len(data)]))


def test_endless_nesting_is_refused() -> None:
    # A graph in an attribute of a node of a graph, and so on: each level wraps the one before.
    data = b""
    for _ in range(200):
        for tag in (0x32, 0x2A, 0x0A):  # Attribute.g, Node.attribute, Graph.node
            data = bytes([tag]) + _varint(len(data)) + data
    with pytest.raises(ValueError, match="nests deeper"):
        external_tensor(b"\x3a" + _varint(len(data)) + data)


def _search(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        external_tensor(data)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
