"""A bundle that is missing, damaged, mixed or hostile: the server refuses to start and names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from bundles import DECODER, ENCODER, decoder, encoder, model, read_card, write_bundle, write_card
from refusals import refusal
from vaeserve_server.bundle import read_bundle
from vaeserve_server.errors import BundleError

IMAGE, LATENT = (1, 4, 4), (3,)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def publish(models: Path, **options: object) -> Path:
    return write_bundle(models, image_shape=IMAGE, latent_shape=LATENT, **options)  # type: ignore[arg-type]


def edit_card(folder: Path, **fields: object) -> None:
    card = json.loads((folder / "model.json").read_text()) | fields
    (folder / "model.json").write_text(json.dumps(card))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def _flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _rename(folder: Path, name: str) -> None:
    card = read_card(folder)
    card.graphs[0].file = name
    write_card(folder, card)


def _drop_graph(folder: Path) -> None:
    card = read_card(folder)
    del card.graphs[1]
    write_card(folder, card)


def _link_out(folder: Path) -> None:
    outside = folder.parents[2] / "outside.onnx"
    (folder / "encoder.onnx").rename(outside)
    (folder / "encoder.onnx").symlink_to(outside)


def _link_circle(folder: Path) -> None:
    (folder / "encoder.onnx").unlink()
    (folder / "encoder.onnx").symlink_to("encoder.onnx")


def _pipe(folder: Path) -> None:
    (folder / "encoder.onnx").unlink()
    os.mkfifo(folder / "encoder.onnx")


def _folder(folder: Path) -> None:
    (folder / "encoder.onnx").unlink()
    (folder / "encoder.onnx").mkdir()


def test_a_sound_bundle_is_read(models: Path) -> None:
    folder = publish(models, prior=True)
    edit_card(folder, field_of_a_later_minor_version={"x": [1]})
    bundle = read_bundle(models, "mnist", "1")
    assert bundle.card.digest == "d" * 64
    assert {file.path.name for file in bundle.graphs.values()} == {"encoder.onnx", "decoder.onnx", "prior.onnx"}


def test_only_what_the_card_names_is_opened(models: Path) -> None:
    folder = publish(models)
    os.mkfifo(folder / "notes.onnx")  # opening it would block for ever
    read_bundle(models, "mnist", "1")


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no card": (lambda folder: (folder / "model.json").unlink(), "model.json", "it is missing"),
    "no graph": (lambda folder: (folder / "decoder.onnx").unlink(), "decoder.onnx", "it is missing"),
    "truncated card": (lambda folder: _truncate(folder / "model.json"), "model.json", "it is not a model card"),
    "card of binary": (
        lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe\x00"),
        "model.json",
        "it is not a model card",
    ),
    "truncated graph": (lambda folder: _truncate(folder / "encoder.onnx"), "encoder.onnx", "its SHA-256 is"),
    "one bit changed": (lambda folder: _flip_bit(folder / "encoder.onnx"), "encoder.onnx", "its SHA-256 is"),
    "graph swapped": (
        lambda folder: shutil.copy(folder / "encoder.onnx", folder / "decoder.onnx"),
        "decoder.onnx",
        "its SHA-256 is",
    ),
    "later schema": (lambda folder: edit_card(folder, schema_version=2), "model.json", "schema_version is 2"),
    "another name": (lambda folder: edit_card(folder, name="faces"), "model.json", "name is 'faces' but the folder"),
    "another version": (lambda folder: edit_card(folder, version="2"), "model.json", "version is '2' but the folder"),
    "no digest": (lambda folder: edit_card(folder, digest=""), "model.json", "digest is ''"),
    "no image shape": (lambda folder: edit_card(folder, image_shape=[]), "model.json", "image_shape is ()"),
    "flat image shape": (lambda folder: edit_card(folder, image_shape=[4, 4]), "model.json", "image_shape is (4, 4)"),
    "negative latent shape": (lambda folder: edit_card(folder, latent_shape=[-3]), "model.json", "latent_shape is"),
    "card lies about the image": (
        lambda folder: edit_card(folder, image_shape=[1, 4, 5]),
        "encoder.onnx",
        "the graph takes image tensor(float) [N, 1, 4, 4] but model.json says image tensor(float) [N, 1, 4, 5]",
    ),
    "card lies about the latent": (lambda folder: edit_card(folder, latent_shape=[4]), "encoder.onnx", "gives mean"),
    "path in a name": (lambda folder: _rename(folder, "../encoder.onnx"), "model.json", "'../encoder.onnx' is no"),
    "absolute path": (lambda folder: _rename(folder, "/etc/passwd"), "model.json", "'/etc/passwd' is no plain name"),
    "no decoder": (_drop_graph, "model.json", "graphs are ['GRAPH_ROLE_ENCODER']"),
    "link out": (_link_out, "encoder.onnx", "a link that leads out of its folder"),
    "circle of links": (_link_circle, "encoder.onnx", "it cannot be read"),
    "pipe": (_pipe, "encoder.onnx", "it is no plain file"),
    "folder": (_folder, "encoder.onnx", "it is no plain file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_stops_the_start_and_is_named(damage: str, models: Path) -> None:
    inflict, file, words = DAMAGE[damage]
    folder = publish(models)
    inflict(folder)
    message = refusal(models)
    assert message.startswith(f"{folder / file}: ")
    assert words in message


def test_an_encoder_beside_another_models_decoder_is_refused(models: Path) -> None:
    # Each file is sound and listed with its own SHA-256; only the digests tell that they do not belong together.
    folder = publish(models, graphs={DECODER: decoder(IMAGE, LATENT, digest="e" * 64)})
    message = refusal(models)
    assert message.startswith(f"{folder / 'decoder.onnx'}: the graph carries digest 'eeee")
    assert "files of different models are mixed" in message


HOSTILE = {
    "without digest": (encoder(IMAGE, LATENT, None), "carries no digest"),  # type: ignore[arg-type]
    "other names": (
        model([helper.make_node("Identity", ["x"], ["mean"])], {"x": IMAGE}, {"mean": IMAGE}, {}),
        "the graph takes x tensor(float) [N, 1, 4, 4]",
    ),
    "too few outputs": (
        model([helper.make_node("Identity", ["image"], ["mean"])], {"image": IMAGE}, {"mean": IMAGE}, {}),
        "the graph gives mean tensor(float) [N, 1, 4, 4] but",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_graph_that_is_not_what_the_card_says_is_refused(kind: str, models: Path) -> None:
    graph, words = HOSTILE[kind]
    folder = publish(models, graphs={ENCODER: graph})
    message = refusal(models)
    assert message.startswith(f"{folder / 'encoder.onnx'}: ")
    assert words in message


def test_a_fixed_batch_size_is_refused(models: Path) -> None:
    graph = encoder(IMAGE, LATENT)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    publish(models, graphs={ENCODER: graph})
    assert "the graph takes image tensor(float) [1, 1, 4, 4] but" in refusal(models)


def test_a_custom_operator_is_refused(models: Path) -> None:
    graph = encoder(IMAGE, LATENT)
    graph.graph.node[0].domain = "com.example"
    graph.opset_import.append(helper.make_opsetid("com.example", 1))
    folder = publish(models, graphs={ENCODER: graph})
    assert refusal(models).startswith(f"{folder / 'encoder.onnx'}: it asks for operator 'Flatten' of domain 'com.exam")


def test_a_graph_whose_shapes_lie_is_found_when_it_warms(models: Path) -> None:
    graph = encoder(IMAGE, LATENT)
    shape = next(value for value in graph.graph.initializer if value.name == "shape")
    shape.CopyFrom(onnx.numpy_helper.from_array(np.array([-1, 1]), "shape"))  # (3 N, 1) where (N, 3) is declared
    publish(models, graphs={ENCODER: graph})
    assert "encoder.onnx: " in refusal(models)


def test_weights_outside_the_file_are_refused(models: Path) -> None:
    graph = encoder(IMAGE, LATENT)
    weight = next(value for value in graph.graph.initializer if value.name == "weight")
    onnx.external_data_helper.set_external_data(weight, "weight.bin", offset=0, length=len(weight.raw_data))
    weight.ClearField("raw_data")
    folder = publish(models, graphs={ENCODER: graph})
    (folder / "weight.bin").write_bytes(bytes(4 * 16 * 3))
    assert refusal(models) == (
        f"{folder / 'encoder.onnx'}: tensor 'weight' is kept outside the file, where no digest covers it"
    )


def test_a_version_that_is_a_link_out_of_the_models_folder_is_refused(models: Path, tmp_path: Path) -> None:
    publish(tmp_path / "elsewhere")
    (models / "mnist").mkdir(parents=True)
    (models / "mnist/1").symlink_to(tmp_path / "elsewhere/mnist/1")
    assert "a link that leads out of" in refusal(models)


def test_links_inside_a_bundle_are_followed(models: Path) -> None:
    folder = publish(models)  # as mounted configuration volumes do it
    (folder / "data").mkdir()
    (folder / "encoder.onnx").rename(folder / "data/encoder.onnx")
    (folder / "encoder.onnx").symlink_to("data/encoder.onnx")
    read_bundle(models, "mnist", "1")


def test_no_models_folder_and_an_empty_one_say_what_to_do(models: Path) -> None:
    assert f"models folder {models} does not exist; train one with" in refusal(models)
    (models / "mnist/not-a-version").mkdir(parents=True)
    (models / ".unfinished/1").mkdir(parents=True)
    assert f"models folder {models} has no model in it; train one with" in refusal(models)


@pytest.mark.parametrize("deeper", ["mnist", "mnist/1"])
def test_a_folder_below_the_models_folder_says_which_is_meant(models: Path, deeper: str) -> None:
    publish(models)
    expected = f"has no model in it; it is a model's own folder: name the one that it lies in, --models {models}"
    assert refusal(models / deeper).endswith(expected)


def test_an_error_names_no_more_than_the_start_of_a_hostile_name(models: Path) -> None:
    folder = publish(models)
    edit_card(folder, name="x" * 100_000)
    with pytest.raises(BundleError) as refused:
        read_bundle(models, "mnist", "1")
    assert len(str(refused.value)) < 500
