"""--precision fp16: served from graphs published for it, on a CPU as well, and refused where there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bundles import (
    DECODER,
    ENCODER,
    FLOAT16_FILES,
    brittle_encoder,
    decoder,
    encoder,
    read_card,
    write_bundle,
    write_card,
)
from serving import running_server
from vaeserve import Client
from vaeserve.v1 import vae_pb2 as pb
from vaeserve_server.bundle import read_bundle
from vaeserve_server.errors import BundleError, StartError

IMAGE, LATENT = (1, 4, 4), (3,)


def test_fp16_answers_like_fp32_as_nearly_as_the_card_says(
    float16_models_dir: Path, test_images: NDArray[np.uint8]
) -> None:
    images = test_images[:100]
    with running_server(float16_models_dir) as server, Client(server.target) as client:
        exact = client.encode(images)
        exact_images = client.decode(exact)
        assert client.model().serving.precision == pb.DATA_TYPE_FLOAT32
    with running_server(float16_models_dir, precision="fp16") as server, Client(server.target) as client:
        rounded = client.encode(images)
        rounded_images = client.decode(exact)  # the digest is the same: it is the same model
        model = client.model()
    assert model.serving.precision == pb.DATA_TYPE_FLOAT16
    assert "in float16" in str(model)
    in_encoder, in_decoder = (graph.parity[0].max_abs_error for graph in model.card.float16_graphs)
    assert rounded.mean.dtype == rounded_images.dtype == np.float32
    assert 0 < np.abs(rounded.mean - exact.mean).max() < 2 * in_encoder
    assert 0 < np.abs(rounded_images - exact_images).max() < 2 * in_decoder


def test_a_bundle_without_fp16_is_refused_with_what_to_do(several_models: Path) -> None:
    with (
        pytest.raises(StartError, match=r"model\.json: it names no graphs in fp16; export .* --precision fp16"),
        running_server(several_models, precision="fp16"),
    ):
        pass


def test_the_prior_is_the_same_in_both(tmp_path: Path) -> None:
    graphs = {ENCODER: brittle_encoder(IMAGE, LATENT), DECODER: decoder(IMAGE, LATENT)}
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT, prior=True, float16_graphs=graphs)
    bundle = read_bundle(tmp_path, "mnist", "1")
    half = bundle.in_precision("fp16")
    assert half.graphs.keys() == bundle.graphs.keys()
    changed = {role for role, graph in half.graphs.items() if graph != bundle.graphs[role]}
    assert changed == {ENCODER, DECODER}
    with running_server(tmp_path, precision="fp16") as server, Client(server.target) as client:
        assert client.sample(3, seed=1, prior="fitted").images.shape == (3, *IMAGE)
        assert not client.encode(np.zeros((2, *IMAGE), np.float32)).mean.any(), "the encoder for fp16 has mean 0"


def test_its_files_are_verified_whatever_is_served(tmp_path: Path) -> None:
    graphs = {ENCODER: encoder(IMAGE, LATENT), DECODER: decoder(IMAGE, LATENT)}
    folder = write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT, float16_graphs=graphs)
    (folder / FLOAT16_FILES[DECODER]).write_bytes(b"something else")
    with pytest.raises(BundleError, match=r"decoder\.fp16\.onnx: its SHA-256 is"):
        read_bundle(tmp_path, "mnist", "1")
    card = read_card(folder)
    del card.float16_graphs[1]
    write_card(folder, card)
    with pytest.raises(BundleError, match=r"float16_graphs are \['GRAPH_ROLE_ENCODER'\]; they must be one encoder and"):
        read_bundle(tmp_path, "mnist", "1")


def test_ports_and_digest_of_its_graphs_are_checked(tmp_path: Path) -> None:
    graphs = {ENCODER: encoder(IMAGE, LATENT, digest="e" * 64), DECODER: decoder(IMAGE, LATENT)}
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT, float16_graphs=graphs)
    with (
        pytest.raises(StartError, match=r"encoder\.fp16\.onnx: the graph carries digest"),
        running_server(tmp_path, precision="fp16"),
    ):
        pass
