"""Bundles made by hand, for what no exporter makes: broken ones, hostile ones, and shapes that no preset has.

The graphs are small but honest: every row's answer depends on that row alone and on all of it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from google.protobuf import json_format
from onnx import TensorProto, helper, numpy_helper

from vaeserve.v1 import vae_pb2

ENCODER, DECODER, PRIOR = vae_pb2.GRAPH_ROLE_ENCODER, vae_pb2.GRAPH_ROLE_DECODER, vae_pb2.GRAPH_ROLE_PRIOR
FILES = {ENCODER: "encoder.onnx", DECODER: "decoder.onnx", PRIOR: "prior.onnx"}
FLOAT16_FILES = {ENCODER: "encoder.fp16.onnx", DECODER: "decoder.fp16.onnx"}
DIGEST = "d" * 64
SLOW_TURNS = 50_000_000  # a minute, so a pixel of 0.01 is about half a second
FACES_IMAGE, FACES_LATENT = (3, 8, 8), (2, 4, 4)  # colour, and a spatial latent


def write_bundle(
    models_dir: Path,
    name: str = "mnist",
    version: str = "1",
    *,
    image_shape: Sequence[int] = (1, 28, 28),
    latent_shape: Sequence[int] = (4,),
    digest: str = DIGEST,
    prior: bool = False,
    graphs: Mapping[int, onnx.ModelProto] | None = None,
    float16_graphs: Mapping[int, onnx.ModelProto] | None = None,
) -> Path:
    """Publish models_dir/name/version and return it. `graphs` replaces some of the graphs made here, by role.

    `float16_graphs` are published as those in float16, whatever they compute in.
    """
    folder = models_dir / name / version
    folder.mkdir(parents=True)
    models = {
        ENCODER: encoder(image_shape, latent_shape, digest),
        DECODER: decoder(image_shape, latent_shape, digest),
        **({PRIOR: prior_graph(latent_shape, digest)} if prior else {}),
        **(graphs or {}),
    }
    card = vae_pb2.ModelCard(
        schema_version=1,
        name=name,
        version=version,
        digest=digest,
        image_shape=image_shape,
        latent_shape=latent_shape,
        likelihood=vae_pb2.LIKELIHOOD_BERNOULLI,
        beta=1.0,
    )
    float16 = float16_graphs or {}
    for made, files, described in ((models, FILES, card.graphs), (float16, FLOAT16_FILES, card.float16_graphs)):
        for role, model in made.items():
            data = model.SerializeToString()
            (folder / files[role]).write_bytes(data)
            described.add(role=role, file=files[role], sha256=hashlib.sha256(data).hexdigest(), opset=18)
    write_card(folder, card)
    return folder


def write_several(models_dir: Path) -> Path:
    """Publish mnist/1, mnist/2 (digests of their own) and faces/9: colour, a spatial latent, a fitted prior."""
    write_bundle(models_dir, "mnist", "1", digest="1" * 64)
    write_bundle(models_dir, "mnist", "2", digest="2" * 64)
    write_bundle(models_dir, "faces", "9", image_shape=FACES_IMAGE, latent_shape=FACES_LATENT, prior=True)
    return models_dir


def write_quick_and_slow(folder: Path, image_shape: Sequence[int], latent_shape: Sequence[int]) -> Path:
    """Write quick/1, and slow/1 with `slow_encoder`; return the folder."""
    write_bundle(folder, "quick", image_shape=image_shape, latent_shape=latent_shape)
    graphs = {ENCODER: slow_encoder(image_shape, latent_shape)}
    write_bundle(folder, "slow", image_shape=image_shape, latent_shape=latent_shape, graphs=graphs)
    return folder


def read_card(folder: Path) -> vae_pb2.ModelCard:
    """Return the card of a bundle."""
    return json_format.Parse((folder / "model.json").read_text(), vae_pb2.ModelCard())


def write_card(folder: Path, card: vae_pb2.ModelCard) -> None:
    """Write model.json as an exporter does."""
    text = json_format.MessageToJson(card, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    (folder / "model.json").write_text(text)


def encoder(
    image_shape: Sequence[int], latent_shape: Sequence[int], digest: str = DIGEST, *, salt: int = 0
) -> onnx.ModelProto:
    """Return image -> mean = image W, stddev = exp(-mean); each `salt` has a W of its own."""
    pixels, size = int(np.prod(image_shape)), int(np.prod(latent_shape))
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weight"], ["flat_mean"]),
        helper.make_node("Reshape", ["flat_mean", "shape"], ["mean"]),
        helper.make_node("Neg", ["mean"], ["negative"]),
        helper.make_node("Exp", ["negative"], ["stddev"]),
    ]
    return model(
        nodes,
        {"image": image_shape},
        {"mean": latent_shape, "stddev": latent_shape},
        {"weight": _weight(pixels, size, salt), "shape": np.array([-1, *latent_shape])},
        digest,
    )


def decoder(
    image_shape: Sequence[int], latent_shape: Sequence[int], digest: str = DIGEST, *, salt: int = 0
) -> onnx.ModelProto:
    """Return latent -> image = sigmoid(z) with z = latent W; not a number where z^2 overflows."""
    pixels, size = int(np.prod(image_shape)), int(np.prod(latent_shape))
    nodes = [
        helper.make_node("Flatten", ["latent"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weight"], ["z"]),
        helper.make_node("Mul", ["z", "z"], ["square"]),
        helper.make_node("Sub", ["square", "square"], ["zero"]),  # infinity - infinity
        helper.make_node("Add", ["z", "zero"], ["same"]),
        helper.make_node("Sigmoid", ["same"], ["squashed"]),
        helper.make_node("Reshape", ["squashed", "shape"], ["image"]),
    ]
    return model(
        nodes,
        {"latent": latent_shape},
        {"image": image_shape},
        {"weight": _weight(size, pixels, salt), "shape": np.array([-1, *image_shape])},
        digest,
    )


def slow_encoder(image_shape: Sequence[int], latent_shape: Sequence[int]) -> onnx.ModelProto:
    """Return an encoder, mean 0 and stddev 1, that takes a minute times the brightest pixel of the batch."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["go_on"]), helper.make_node("Add", ["sum", "tiny"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, []),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["brightest"], keepdims=0),
        helper.make_node("Mul", ["brightest", "most_turns"], ["turns"]),
        helper.make_node("Cast", ["turns"], ["count"], to=TensorProto.INT64),
        helper.make_node("Loop", ["count", "true", "tiny"], ["spent"], body=body),
        helper.make_node("Mul", ["spent", "nothing"], ["bias"]),
    ]
    return _flat_encoder(
        nodes,
        image_shape,
        latent_shape,
        {
            "most_turns": np.float32(SLOW_TURNS),
            "true": np.bool_(True),
            "tiny": np.float32(1e-9),
            "nothing": np.float32(0),
        },
    )


def endless_on_zeros(image_shape: Sequence[int], latent_shape: Sequence[int]) -> onnx.ModelProto:
    """Return an encoder that takes a minute for black images, with which a graph is warmed before it serves."""
    made = slow_encoder(image_shape, latent_shape)
    (position,) = (at for at, node in enumerate(made.graph.node) if node.op_type == "ReduceMax")
    made.graph.node[position].output[0] = "dark"
    made.graph.node.insert(position + 1, helper.make_node("Cos", ["dark"], ["brightest"]))
    return made


def aborting_encoder(image_shape: Sequence[int], latent_shape: Sequence[int]) -> onnx.ModelProto:
    """Return an encoder of honest operators whose run aborts the process: a convolution of scalars."""
    made = slow_encoder(image_shape, latent_shape)
    (node,) = (node for node in made.graph.node if "spent" in node.input)
    node.op_type = "Conv"
    return made


def brittle_encoder(image_shape: Sequence[int], latent_shape: Sequence[int]) -> onnx.ModelProto:
    """Return an encoder, mean 0 and stddev 1, whose run fails if any pixel of the batch is 1."""
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["brightest"], keepdims=0),
        helper.make_node("Cast", ["brightest"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["one_value", "index"], ["bias"]),  # index 1 of one value
    ]
    return _flat_encoder(nodes, image_shape, latent_shape, {"one_value": np.zeros(1, np.float32)})


def _flat_encoder(
    nodes: Sequence[onnx.NodeProto],
    image_shape: Sequence[int],
    latent_shape: Sequence[int],
    constants: Mapping[str, np.generic | np.ndarray],
) -> onnx.ModelProto:
    """Return image -> mean = 0 + bias, stddev = exp(mean), where `nodes` compute the scalar `bias`."""
    pixels, size = int(np.prod(image_shape)), int(np.prod(latent_shape))
    tail = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum_of_both"]),
        helper.make_node("Reshape", ["sum_of_both", "shape"], ["mean"]),
        helper.make_node("Exp", ["mean"], ["stddev"]),
    ]
    weights = {"weight": np.zeros((pixels, size), np.float32), "shape": np.array([-1, *latent_shape])}
    outputs = {"mean": latent_shape, "stddev": latent_shape}
    return model([*nodes, *tail], {"image": image_shape}, outputs, {**constants, **weights})


def prior_graph(latent_shape: Sequence[int], digest: str = DIGEST) -> onnx.ModelProto:
    """Return noise -> latent = 2 noise + 1."""
    nodes = [
        helper.make_node("Mul", ["noise", "two"], ["scaled"]),
        helper.make_node("Add", ["scaled", "one"], ["latent"]),
    ]
    constants = {"two": np.float32(2), "one": np.float32(1)}
    return model(nodes, {"noise": latent_shape}, {"latent": latent_shape}, constants, digest)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int]],
    constants: Mapping[str, np.generic | np.ndarray],
    digest: str | None = DIGEST,
) -> onnx.ModelProto:
    """Return a checked model with a free batch axis and `digest` in its metadata."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape]) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape]) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if digest is not None:
        helper.set_model_props(made, {"vaeserve.digest": digest})
    onnx.checker.check_model(made)
    return made


def _weight(rows: int, columns: int, salt: int = 0) -> np.ndarray:
    random = np.random.default_rng([rows * 1009 + columns, salt] if salt else rows * 1009 + columns)
    return (random.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)


def run_directly(folder: Path, role: int, batch: np.ndarray) -> list[np.ndarray]:
    """Return what ONNX Runtime gives for `batch`, with nothing of the server between."""
    session = _session(folder / FILES[role])
    return session.run(None, {session.get_inputs()[0].name: batch.astype(np.float32)})


@functools.cache
def _session(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
