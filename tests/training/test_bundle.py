"""A bundle appears whole or not at all, is never changed, and its digest is that of what the graphs compute."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vaeserve.v1 import vae_pb2
from vaeserve_training import atomic, bundle
from vaeserve_training.bundle import BundleError

GRAPHS = {bundle.ENCODER_FILE: b"an encoder", bundle.DECODER_FILE: b"a decoder"}
WEIGHTS: dict[str, NDArray[np.generic]] = {
    "encoder.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "decoder.weight": np.array([1.0, -0.0], dtype=np.float32),
}


def card(name: str = "mnist") -> vae_pb2.ModelCard:
    return vae_pb2.ModelCard(
        schema_version=1,
        name=name,
        graphs=[
            vae_pb2.Graph(role=vae_pb2.GRAPH_ROLE_ENCODER, file=bundle.ENCODER_FILE),
            vae_pb2.Graph(role=vae_pb2.GRAPH_ROLE_DECODER, file=bundle.DECODER_FILE),
        ],
    )


def publish(models_dir: Path, *, name: str = "mnist", version: int | None = None) -> Path:
    return bundle.publish(models_dir, card(name), GRAPHS, version=version)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_holds_its_graphs_and_a_card_that_names_them(tmp_path: Path) -> None:
    path = publish(tmp_path / "models")
    assert path == tmp_path / "models" / "mnist" / "1"
    found = contents(path)
    assert found.keys() == {*GRAPHS, bundle.CARD_FILE}
    read = bundle.read_card(path)
    assert (read.name, read.version) == ("mnist", "1")
    assert {graph.file: graph.sha256 for graph in read.graphs} == {
        name: hashlib.sha256(content).hexdigest() for name, content in GRAPHS.items()
    }
    assert b'"schema_version"' in found[bundle.CARD_FILE], "the field names are those of vae.proto"
    assert b'"beta"' in found[bundle.CARD_FILE], "defaults are printed"
    assert b'"sigma"' not in found[bundle.CARD_FILE], "what is unknown is absent"


def test_versions_count_up_whatever_else_lies_there(tmp_path: Path) -> None:
    assert bundle.next_version(tmp_path, "mnist") == 1
    assert publish(tmp_path).name == "1"
    assert publish(tmp_path, version=9).name == "9"
    for other in ("007", "12-backup", ".13.tmp", "notes"):
        (tmp_path / "mnist" / other).mkdir()
    assert publish(tmp_path).name == "10"
    assert publish(tmp_path, name="fashion").name == "1"


def test_a_published_version_is_never_changed(tmp_path: Path) -> None:
    path = publish(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(BundleError, match=r"mnist/1 exists, and a published version is never changed; .* \(2\)"):
        publish(tmp_path, version=1)
    with pytest.raises(FileExistsError, match="never changed"):
        atomic.publish_folder(path, {"other": b"content"})
    assert contents(tmp_path) == before


def test_an_empty_folder_is_a_version_too(tmp_path: Path) -> None:
    (tmp_path / "mnist" / "1").mkdir(parents=True)
    with pytest.raises(FileExistsError):
        atomic.publish_folder(tmp_path / "mnist" / "1", {"file": b"content"})
    assert contents(tmp_path) == {}


def test_of_two_exporters_the_second_takes_the_next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def overtaken(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        (tmp_path / "mnist" / "1").mkdir()
        (tmp_path / "mnist" / "1" / bundle.CARD_FILE).write_bytes(b"the other's")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    assert publish(tmp_path).name == "2"
    assert contents(tmp_path / "mnist" / "1") == {bundle.CARD_FILE: b"the other's"}
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("version", [0, -1])
def test_a_version_is_positive(version: int, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"version {version}: use a positive integer"):
        publish(tmp_path, version=version)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "-flag", ".hidden", "gr\u00fc\u00df", "new\nline", "a "]
)
def test_a_name_is_one_that_a_server_can_serve(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="use letters, digits"):
        publish(tmp_path, name=name)
    assert list(tmp_path.iterdir()) == []


def failing_at(call: int, function: Callable[..., object]) -> Callable[..., object]:
    """Return a function that raises ENOSPC at its `call`-th call and does what `function` does at the others."""
    calls = 0

    def sometimes(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments, **keywords)

    return sometimes


# 3 files and their folder are flushed before the rename.
@pytest.mark.parametrize(("owner", "name", "call"), [*((os, "fsync", n) for n in range(1, 5)), (Path, "rename", 1)])
def test_a_full_disk_at_any_step_publishes_nothing_and_leaves_nothing(
    owner: object, name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models_dir = tmp_path / "models"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing_at(call, getattr(owner, name)))
        with pytest.raises(BundleError, match="No space left on device; nothing was published"):
            publish(models_dir)
        assert list(tmp_path.iterdir()) == []
    publish(models_dir)
    before = contents(models_dir)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing_at(call, getattr(owner, name)))
        with pytest.raises(BundleError, match="No space left on device"):
            publish(models_dir)
    assert contents(models_dir) == before
    assert [path.name for path in (models_dir / "mnist").iterdir()] == ["1"]


def test_the_digest_is_a_fixed_function() -> None:
    """A change of this value would make every published bundle's digest wrong."""
    found = bundle.digest(WEIGHTS, {"latent_size": 2}, {"opset": 18})
    lines = [
        b"vaeserve bundle 1\n",
        b'{"architecture":{"latent_size":2},"settings":{"opset":18}}\n',
        b'{"dtype":"float32","name":"decoder.weight","shape":[2]}\n',
        bytes.fromhex("0000803f 00000080"),
        b'{"dtype":"float32","name":"encoder.weight","shape":[2,3]}\n',
        bytes.fromhex("00000000 0000803f 00000040 00004040 00008040 0000a040"),
    ]
    assert found == hashlib.sha256(b"".join(lines)).hexdigest()


def test_order_and_memory_layout_do_not_enter_the_digest() -> None:
    expected = bundle.digest(WEIGHTS, {"a": 1, "b": 2}, {})
    turned = {name: np.asfortranarray(WEIGHTS[name]) for name in reversed(WEIGHTS)}
    big_endian = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in WEIGHTS.items()}
    assert bundle.digest(turned, {"b": 2, "a": 1}, {}) == expected
    assert bundle.digest(big_endian, {"a": 1, "b": 2}, {}) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"encoder.weight": np.nextafter(WEIGHTS["encoder.weight"], np.float32(9))},
        {"encoder.weight": WEIGHTS["encoder.weight"].reshape(3, 2)},
        {"decoder.weight": np.array([1.0, 0.0], dtype=np.float32)},
        {"decoder.weight": np.array([1.0, -0.0], dtype=np.float32).view(np.int32)},
        {"decoder.other": np.zeros(1, dtype=np.float32)},
    ],
    ids=["value", "shape", "sign of zero", "dtype", "name"],
)
def test_whatever_a_graph_computes_with_enters_the_digest(changed: dict[str, NDArray[np.generic]]) -> None:
    assert bundle.digest(WEIGHTS | changed, {}, {}) != bundle.digest(WEIGHTS, {}, {})


def test_architecture_and_settings_enter_the_digest() -> None:
    digests = {
        bundle.digest(WEIGHTS, {}, {}),
        bundle.digest(WEIGHTS, {"a": 1}, {}),
        bundle.digest(WEIGHTS, {}, {"a": 1}),
    }
    assert len(digests) == 3
