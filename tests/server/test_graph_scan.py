"""The search for what an ONNX file may not have: it is found wherever it hides, and no bytes break the search."""

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
from vaeserve_server.graph_scan import problem
from vaeserve_server.protobuf_wire import varint

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
        hidden_without_location,
        hidden_at_an_address,
    ],
)
def test_a_tensor_outside_is_found(hide: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(SOUND)
    assert problem(model.SerializeToString()) is None
    hide(model)
    assert "tensor 'w' is kept outside the file" in (problem(model.SerializeToString()) or "")


def function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("", "Sigmoid", ["a"], ["b"], [node], []))


def sparse_tensor(model: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**40]))


def sparse_attribute(model: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64), "i"), [2**40])
    model.graph.node.append(helper.make_node("Constant", [], ["c"], sparse_value=sparse))


def operator_of_another_domain(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("EPContext", [], ["c"], domain="com.microsoft"))


def operator_of_another_domain_in_a_branch(model: onnx.ModelProto) -> None:
    body = helper.make_graph([helper.make_node("Gelu", ["a"], ["b"], domain="com.microsoft")], "body", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=body, else_branch=body))


FORBIDDEN: dict[Callable[[onnx.ModelProto], None], str] = {
    function: "it defines operators of its own",
    sparse_tensor: "it has a sparse tensor",
    sparse_attribute: "it has a sparse tensor",
    operator_of_another_domain: "it asks for operator 'EPContext' of domain 'com.microsoft'; a graph may",
    operator_of_another_domain_in_a_branch: "it asks for operator 'Gelu' of domain 'com.microsoft'",
}


@pytest.mark.parametrize("add", FORBIDDEN, ids=lambda add: add.__name__)
def test_what_no_exporter_makes_is_found(add: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(SOUND)
    add(model)
    assert (problem(model.SerializeToString()) or "").startswith(FORBIDDEN[add])


def test_onnx_may_be_called_by_its_name() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(SOUND)
    model.graph.node[0].domain = "ai.onnx"
    assert problem(model.SerializeToString()) is None


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
            data = bytes([tag]) + varint(len(data)) + data
    with pytest.raises(ValueError, match="nests deeper"):
        problem(b"\x3a" + varint(len(data)) + data)


def _search(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        problem(data)
