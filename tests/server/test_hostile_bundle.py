"""Bundles made to harm: only what a card names is opened, only what was verified runs, and nothing is huge."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import refusals
from bundles import ENCODER, decoder, encoder, model, read_card, run_directly, write_bundle, write_card
from serving import running_server
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server import bundle
from vaeserve_server.bundle import read_bundle
from vaeserve_server.errors import BundleError

IMAGE, LATENT = (1, 4, 4), (3,)
MIB = 2**20
refusal = functools.partial(refusals.refusal, transport="grpc")  # what is read does not know what carries it


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def publish(models: Path, version: str = "1", **options: Any) -> Path:
    return write_bundle(models, version=version, image_shape=IMAGE, latent_shape=LATENT, **options)


# Names and links.


@pytest.mark.parametrize(
    "name", ["..2", "-2", "2 ", "02", "+2", "2.0", "0x2", "٢", "two", "2\n", "%32", "~2", "9" * 40]
)
def test_a_version_folder_of_another_name_is_left_alone(models: Path, name: str) -> None:
    publish(models).rename(models / "mnist" / name)
    publish(models)
    with running_server(models, transport="grpc") as server, grpc.insecure_channel(server.target) as channel:
        served = vae_pb2_grpc.VaeServiceStub(channel).ListModels(pb.ListModelsRequest()).models
    assert [one.card.version for one in served] == ["1"]


@pytest.mark.parametrize("name", ["a b", "-a", "a\nb", "ä", "a:b", "~", "$HOME", "a*"])
def test_a_model_folder_of_another_name_is_left_alone(models: Path, name: str) -> None:
    folder = publish(models)
    folder.parent.rename(models / name)
    assert "has no model in it" in refusal(models)


FILES = [
    "../encoder.onnx",
    "../../mnist/1/encoder.onnx",
    "/etc/passwd",
    "/etc/passwd.onnx",
    "sub/encoder.onnx",
    "sub\\encoder.onnx",
    "./encoder.onnx",
    ".encoder.onnx",
    "encoder.onnx/.",
    "encoder.onnx\0",
    "encoder.onnx\n",
    "file:encoder.onnx",
    "encoder.pkl",
    "",
    "x" * 5000 + ".onnx",
]


@pytest.mark.parametrize("file", FILES)
def test_a_graph_of_another_name_is_refused(models: Path, file: str) -> None:
    folder = publish(models)
    card = read_card(folder)
    card.graphs[0].file = file
    write_card(folder, card)
    message = refusal(models)
    assert message.startswith(f"{folder / 'model.json'}: graph file ")
    assert message.endswith("is no plain name that ends in .onnx")


def link_model(models: Path, elsewhere: Path) -> None:
    (models / "mnist").rename(elsewhere)
    (models / "mnist").symlink_to(elsewhere)


def link_version(models: Path, elsewhere: Path) -> None:
    (models / "mnist" / "1").rename(elsewhere)
    (models / "mnist" / "1").symlink_to(elsewhere)


def link_card(models: Path, elsewhere: Path) -> None:
    (models / "mnist" / "1" / "model.json").rename(elsewhere)
    (models / "mnist" / "1" / "model.json").symlink_to(elsewhere)


LINKS = {link_model: "leads out of", link_version: "leads out of", link_card: "leads out of its folder"}


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.__name__)
def test_a_link_out_of_the_models_folder_is_refused(
    models: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    publish(models)
    link(models, tmp_path / "elsewhere")
    message = refusal(models)
    assert message.startswith(f"{models / 'mnist' / '1'}")
    assert LINKS[link] in message


def test_a_version_that_is_a_link_to_another_one_is_refused(models: Path) -> None:
    publish(models)
    (models / "mnist" / "2").symlink_to("1")
    with pytest.raises(BundleError, match="version is '1' but the folder says '2'"):
        read_bundle(models, "mnist", "2")


def test_the_models_folder_itself_may_be_a_link(models: Path, tmp_path: Path) -> None:
    publish(models)
    (tmp_path / "link").symlink_to(models)
    read_bundle(tmp_path / "link", "mnist", "1")


# Graphs.


def asking_for_files(models: Path) -> onnx.ModelProto:
    """Return an encoder with an operator of ONNX Runtime's own that opens a file by its name."""
    graph = encoder(IMAGE, LATENT)
    context = helper.make_node("EPContext", ["image"], ["mean"], domain="com.microsoft", ep_cache_context="/etc/passwd")
    graph.graph.node.insert(0, context)
    return graph


def claiming(dims: list[int], **data: Any) -> onnx.ModelProto:
    """Return an encoder with a further initialiser, used, that claims to be of that shape."""
    graph = encoder(IMAGE, LATENT)
    huge = TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=dims, **data)
    graph.graph.initializer.append(huge)
    graph.graph.node[0].output[0] = "flat_image"
    graph.graph.node.insert(1, helper.make_node("ReduceMax", ["huge"], ["most"], keepdims=0))
    graph.graph.node.insert(2, helper.make_node("Add", ["flat_image", "most"], ["flat"]))
    return graph


def sparse() -> onnx.ModelProto:
    graph = claiming([1], float_data=[1.0])
    del graph.graph.initializer[-1]
    values = numpy_helper.from_array(np.ones(1, np.float32), "huge")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "huge_indices")
    graph.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**40]))
    return graph


HUGE = {
    "terabytes of nothing": claiming([2**40]),
    "terabytes of one value": claiming([2**40], float_data=[1.0]),
    "gigabytes of a few bytes": claiming([2**31], raw_data=b"1234"),
    "more than can be counted": claiming([2**62, 8], raw_data=b"1234"),
    "less than nothing": claiming([-1, 4], raw_data=b"1234"),
    "sparse terabytes": sparse(),
}


@pytest.mark.parametrize("kind", HUGE)
def test_an_initialiser_that_claims_to_be_huge_costs_nothing(models: Path, kind: str) -> None:
    folder = publish(models, graphs={ENCODER: HUGE[kind]})
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(models).startswith(f"{folder / 'encoder.onnx'}: ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200 * 1024


def of_type(kind: int) -> onnx.ModelProto:
    graph = encoder(IMAGE, LATENT)
    cast = helper.make_node("Cast", ["image_as_sent"], ["image"], to=TensorProto.FLOAT)
    graph.graph.node.insert(0, cast)
    graph.graph.input[0].CopyFrom(helper.make_tensor_value_info("image_as_sent", kind, ["N", *IMAGE]))
    for node in graph.graph.node:
        node.input[:] = [{"image_as_sent": "image", "image": "as_float"}.get(name, name) for name in node.input]
        node.output[:] = ["as_float" if name == "image" else name for name in node.output]
    graph.graph.input[0].name = "image"
    return graph


def with_outputs(*names: str) -> onnx.ModelProto:
    graph = encoder(IMAGE, LATENT)
    by_name = {output.name: output for output in graph.graph.output}
    chosen = [copy.deepcopy(by_name[name]) for name in names]
    del graph.graph.output[:]
    graph.graph.output.extend(chosen)
    return graph


def with_second_input() -> onnx.ModelProto:
    graph = encoder(IMAGE, LATENT)
    graph.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["N", 1]))
    return graph


def sequence() -> onnx.ModelProto:
    graph = with_outputs("mean")
    graph.graph.node.append(helper.make_node("SequenceConstruct", ["stddev"], ["all"]))
    graph.graph.output.append(helper.make_tensor_sequence_value_info("all", TensorProto.FLOAT, None))
    return graph


WRONG_PORTS = {
    "bytes in": (of_type(TensorProto.UINT8), "the graph takes image tensor(uint8)"),
    "doubles in": (of_type(TensorProto.DOUBLE), "the graph takes image tensor(double)"),
    "halves in": (of_type(TensorProto.FLOAT16), "the graph takes image tensor(float16)"),
    "outputs swapped": (with_outputs("stddev", "mean"), "the graph gives stddev"),
    "an output missing": (with_outputs("mean"), "the graph gives mean tensor(float) [N, 3] but"),
    "an output twice": (with_outputs("mean", "stddev", "mean"), ""),
    "a second input": (with_second_input(), "more tensor(float) [N, 1] but"),
    "a sequence out": (sequence(), "the graph gives mean tensor(float) [N, 3], all seq(tensor(float))"),
    "the decoder's": (decoder(IMAGE, LATENT), "the graph takes latent tensor(float)"),
    "files": (asking_for_files(Path()), "it asks for operator 'EPContext' of domain 'com.microsoft'"),
    "no graph": (onnx.ModelProto(), ""),
    "nothing to compute": (model([], {"image": IMAGE}, {}, {}), ""),
}


@pytest.mark.parametrize("kind", WRONG_PORTS)
def test_a_graph_of_another_kind_is_refused(models: Path, kind: str) -> None:
    graph, words = WRONG_PORTS[kind]
    folder = publish(models, graphs={ENCODER: graph})
    message = refusal(models)
    assert message.startswith(f"{folder / 'encoder.onnx'}: ")
    assert words in message


# Cards.


def text_of(folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((folder / "model.json").read_text())
    return card


SHAPES = [[1, 4, 5], [2**31 - 1] * 3, [1, 2**31 - 1, 2**31 - 1], [16], [1, 1, 4, 4], [1, 16, 1], [4, 4, 1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("field", ["image_shape", "latent_shape"])
def test_a_card_that_lies_about_shapes_is_refused(models: Path, field: str, shape: list[int]) -> None:
    folder = publish(models)
    (folder / "model.json").write_text(json.dumps(text_of(folder) | {field: shape}))
    message = refusal(models)
    assert message.startswith(str(folder))
    assert "shape" in message or "but model.json says" in message


def valid(folder: Path) -> str:
    return (folder / "model.json").read_text()


CARDS: dict[str, Callable[[str], str]] = {
    "a key twice": lambda text: '{"digest": "x", ' + text.lstrip()[1:],
    "a nested key twice": lambda text: text.replace('"role":', '"role": 1, "role":', 1),
    "deep lists": lambda text: '{"x": ' + "[" * 200_000 + "]" * 200_000 + ", " + text.lstrip()[1:],
    "deep objects": lambda _text: '{"x":' * 100_000 + "1" + "}" * 100_000,
    "not an object": lambda _text: "[1, 2]",
    "a number": lambda _text: "1",
    "a number without end": lambda text: text.replace('"schema_version": 1', '"schema_version": ' + "1" * 100_000),
    "a text without end": lambda text: text.replace('"schema_version": 1', '"schema_version": "' + "1" * 100_000 + '"'),
    "an infinite version": lambda text: text.replace('"schema_version": 1', '"schema_version": 1e999'),
    "no number": lambda text: text.replace('"schema_version": 1', '"schema_version": NaN'),
    "null": lambda _text: "null",
    "nothing": lambda _text: "",
    "zeros": lambda _text: "\0" * 1000,
    "giant": lambda text: " " * (4 * MIB) + text,
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_that_is_none_is_refused(models: Path, kind: str) -> None:
    folder = publish(models)
    changed = CARDS[kind](valid(folder))
    assert changed != valid(folder)
    (folder / "model.json").write_text(changed)
    message = refusal(models)
    assert message.startswith(f"{folder / 'model.json'}: ")
    assert len(message) < 500


_ODD = [2**31, -(2**63), 2**64, 1e308, 10**30, "NaN", "Infinity", "1e9", "../x", "\ud800", "9" * 400]


@functools.cache
def values() -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(_ODD)
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    models = tmp_path_factory.mktemp("published")
    return models, publish(models, prior=True)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_card_is_read_or_refused_in_one_line(published: tuple[Path, Path], data: st.DataObject) -> None:
    models, folder = published
    if not (folder / "sound.json").exists():
        (folder / "sound.json").write_text(valid(folder))
    card = json.loads((folder / "sound.json").read_text())
    card = dict.fromkeys(field.name for field in pb.ModelCard.DESCRIPTOR.fields) | card
    place: Any = card
    key: Any = data.draw(st.sampled_from(list(card)))
    while isinstance(inner := place[key], dict | list) and inner and data.draw(st.booleans()):
        place, key = inner, data.draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
    place[key] = data.draw(values())
    (folder / "model.json").write_text(json.dumps(card))
    try:
        found = read_bundle(models, "mnist", "1")
    except BundleError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(str(folder))
    else:
        assert (found.card.name, found.card.version, found.card.schema_version) == ("mnist", "1", 1)


# Files that change while they are looked at.


def test_the_bytes_that_were_verified_are_those_that_run(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = publish(models)
    images = np.random.default_rng(0).random((2, *IMAGE), np.float32)
    expected = run_directly(folder, ENCODER, images)[0]
    sound = (folder / "encoder.onnx").read_bytes()
    evil = encoder((1, 4, 4), LATENT)
    weight = next(value for value in evil.graph.initializer if value.name == "weight")
    weight.raw_data = bytes(len(weight.raw_data))

    def replace_and_hash(data: bytes) -> Any:
        """Stand in for SHA-256: as soon as the graph is being verified, the file is another one."""
        if data == sound:
            (folder / "encoder.onnx").write_bytes(evil.SerializeToString())
        return hashlib.sha256(data)

    class Hashes:
        sha256 = staticmethod(replace_and_hash)

    monkeypatch.setattr(bundle, "hashlib", Hashes)
    with running_server(models, transport="grpc") as server, grpc.insecure_channel(server.target) as channel:
        request = pb.EncodeRequest(images=tensors.to_tensor(images))
        mean = tensors.from_tensor(vae_pb2_grpc.VaeServiceStub(channel).Encode(request).mean)
    assert (folder / "encoder.onnx").read_bytes() != sound
    assert np.allclose(mean, expected, atol=1e-6)


def test_a_pipe_in_the_place_of_a_file_holds_nothing_up(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = publish(models)
    resolve = Path.resolve

    def swap_and_resolve(path: Path, strict: bool = False) -> Path:  # after the last look at the name
        resolved = resolve(path, strict=strict)
        if path.name == "encoder.onnx":
            path.unlink()
            os.mkfifo(path)
        return resolved

    monkeypatch.setattr(Path, "resolve", swap_and_resolve)
    failures: list[str] = []

    def read() -> None:
        with pytest.raises(BundleError) as refused:
            read_bundle(models, "mnist", "1")
        failures.append(str(refused.value))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(20)
    assert failures == [f"{folder / 'encoder.onnx'}: it is no plain file"]


# What is opened.

TRACE = """
import os
import sys
from pathlib import Path
folder, opened = str(Path(sys.argv[1]).resolve()), set()
def hook(event, arguments):
    if event == "open" and str(arguments[0]).startswith(folder):
        opened.add(str(arguments[0])[len(folder) + 1:])
sys.addaudithook(hook)
sys.path[:0] = sys.argv[2:]
from serving import running_server
with running_server(Path(sys.argv[1]), transport="grpc"):
    pass
print("\\n".join(sorted(opened)), flush=True)
os._exit(0)  # grpcio's own threads may hold up an end that nobody waits for
"""


def test_only_what_the_served_cards_name_is_opened(models: Path) -> None:
    folder = publish(models, "2")
    publish(models, "1")  # not served
    for name in ("weights.bin", "encoder.onnx.data", "model.json.bak", "__init__.py", "custom_ops.so", "state.pkl"):
        (folder / name).write_bytes(b"import os")
    (models / "mnist" / ".3.tmp").mkdir()
    (models / "mnist" / ".3.tmp" / "model.json").write_text("{")
    tests = Path(__file__).parent
    environment = {**os.environ, "VAESERVE_VERSIONS": "1"}
    command = [sys.executable, "-c", TRACE, str(models), str(tests.parent), str(tests)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["mnist/2/decoder.onnx", "mnist/2/encoder.onnx", "mnist/2/model.json"]
