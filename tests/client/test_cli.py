"""The command line: files in, files out, one clear line where something is wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from faulty_server import faulty_server
from serving import running_server
from vaeserve import Client, cli
from vaeserve.errors import no_answer

REAL = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def target(models_dir):
    with running_server(models_dir) as running:
        yield running.target


@pytest.fixture
def run(target, capfd):
    """Run `vaeserve` in this process; return its exit status, standard output and standard error."""

    def run(*arguments, to=target):
        try:
            status = cli.main([*map(str, arguments), "--target", to])
        except SystemExit as leave:  # argparse
            status = leave.code
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture
def images_file(test_images, tmp_path):
    np.save(tmp_path / "images.npy", test_images[:20, 0])
    return tmp_path / "images.npy"


@pytest.fixture
def pictures(test_images, tmp_path):
    """A folder of image files, one of them in a folder of its own."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for row, name in enumerate(["a.png", "b.PNG", "more/c.png"]):
        Image.fromarray(test_images[row, 0]).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_info_shows_the_model_to_people_and_to_programs(run, bundle_dir):
    card = json.loads((bundle_dir / "model.json").read_text())
    status, out, err = run("info")
    assert (status, err) == (0, "")
    assert out.startswith("mnist/1\n")
    for words in ("1 x 28 x 28", "binarised", "bernoulli", "CPUExecutionProvider", card["digest"]):
        assert words in out
    status, out, _ = run("info", "--json")
    assert [each["card"] for each in json.loads(out)] == [card]
    assert run("info", "--model", "mnist", "--version", "1")[0] == 0


def test_health_is_an_exit_status(run, target):
    assert run("health") == (0, f"{target} is serving\n", "")
    assert run("health", "--wait", 5) == (0, f"{target} is serving\n", "")
    assert run("health", to="127.0.0.1:1") == (1, "127.0.0.1:1 is not serving\n", "")
    status, _, err = run("health", "--wait", 0.2, to="127.0.0.1:1")
    assert status == 1
    assert err == "vaeserve: the server at 127.0.0.1:1 was not ready within 0.2 s; nothing answered there\n"


def test_arrays_are_encoded_and_decoded_again(run, target, images_file, tmp_path):
    codes_file, decoded = tmp_path / "codes.npz", tmp_path / "decoded.npy"
    status, out, err = run("encode", images_file, "-o", codes_file, "--seed", 5)
    assert (status, out, err) == (0, f"{codes_file}: 20 images encoded by mnist/1\n", "")
    assert run("decode", codes_file, "-o", decoded)[0] == 0
    with Client(target) as client, np.load(codes_file) as written:
        codes = client.encode(np.load(images_file), want_latents=True, seed=5)
        np.testing.assert_allclose(written["mean"], codes.mean, **REAL)
        np.testing.assert_allclose(written["stddev"], codes.stddev, **REAL)
        np.testing.assert_allclose(written["latents"], codes.latents, **REAL)
        assert int(written["seed"]) == 5
        assert str(written["model_digest"]) == codes.model.digest
        np.testing.assert_allclose(np.load(decoded), client.decode(codes), **REAL)
        assert run("decode", codes_file, "--use", "latents", "-o", decoded)[0] == 0
        np.testing.assert_allclose(np.load(decoded), client.decode(codes.latents), **REAL)


def test_image_files_are_encoded_in_the_order_of_their_names(run, target, pictures, test_images, tmp_path):
    assert run("encode", pictures, "-o", tmp_path / "codes.npz")[0] == 0
    with Client(target) as client, np.load(tmp_path / "codes.npz") as written:
        np.testing.assert_allclose(written["mean"], client.encode(test_images[:3]).mean, **REAL)
        assert list(written["files"]) == [str(pictures / name) for name in ("a.png", "b.PNG", "more/c.png")]
    assert run("encode", pictures / "a.png", "-o", tmp_path / "one.npy")[0] == 0
    assert np.load(tmp_path / "one.npy").shape == (1, 20)


def test_other_sizes_are_scaled_only_if_asked(run, tmp_path):
    Image.new("RGB", (50, 40), "white").save(tmp_path / "photo.jpg")
    status, out, err = run("encode", tmp_path / "photo.jpg", "-o", tmp_path / "codes.npy")
    assert (status, out) == (1, "")
    words = "is 50 x 40 pixels; model mnist/1 takes 28 x 28; add --resize to scale to that"
    assert err == f"vaeserve: {tmp_path}/photo.jpg: {words}\n"
    assert run("encode", tmp_path / "photo.jpg", "-o", tmp_path / "codes.npy", "--resize")[0] == 0
    assert np.load(tmp_path / "codes.npy").shape == (1, 20)


def test_latents_become_numbered_pictures_or_one_grid(run, target, tmp_path):
    latents = np.random.default_rng(0).standard_normal((5, 20), dtype=np.float32)
    np.save(tmp_path / "latents.npy", latents)
    assert run("decode", tmp_path / "latents.npy", "-o", tmp_path / "folder")[0] == 0
    assert run("decode", tmp_path / "latents.npy", "-o", tmp_path / "grid.png")[0] == 0
    with Client(target) as client:
        expected = client.decode(latents, dtype="uint8")[:, 0].astype(int)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [f"0000{row}.png" for row in range(5)]
    grid = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    assert grid.shape == (2 * 28 + 2, 3 * 28 + 2 * 2)
    for row, image in enumerate(expected):
        written = np.asarray(Image.open(tmp_path / "folder" / f"0000{row}.png")).astype(int)
        top, left = row // 3 * 30, row % 3 * 30
        assert np.abs(written - image).max() <= 1
        assert np.abs(grid[top : top + 28, left : left + 28] - image).max() <= 1


def test_samples_of_a_seed_can_be_had_again(run, tmp_path):
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    status, out, _ = run("sample", 6, "-o", first)
    assert status == 0
    seed = int(out.rsplit("seed ", 1)[1])
    assert run("sample", 6, "-o", second, "--seed", seed, "--temperature", 1)[0] == 0
    with np.load(first) as a, np.load(second) as b:
        np.testing.assert_array_equal(a["latents"], b["latents"])
        np.testing.assert_allclose(a["images"], b["images"], **REAL)
        assert int(a["seed"]) == int(b["seed"]) == seed
    assert run("sample", 6, "-o", tmp_path / "third.npy", "--dtype", "uint8")[0] == 0
    assert np.load(tmp_path / "third.npy").dtype == np.uint8


def test_codes_of_another_model_are_refused(run, images_file, tmp_path):
    run("encode", images_file, "-o", tmp_path / "codes.npz")
    with np.load(tmp_path / "codes.npz") as written:
        foreign = {**written, "model_digest": "0" * 64}
    np.savez(tmp_path / "foreign.npz", **foreign)
    status, _, err = run("decode", tmp_path / "foreign.npz", "-o", tmp_path / "decoded.npy")
    assert status == 1
    assert "digest" in err
    assert not (tmp_path / "decoded.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encode", "{tmp}/none.npy", "-o", "{tmp}/o.npz"], "{tmp}/none.npy: no such file"),
        (["encode", "{tmp}/none.png", "-o", "{tmp}/o.npz"], "{tmp}/none.png: no such file or folder"),
        (["encode", "{tmp}/empty", "-o", "{tmp}/o.npz"], "{tmp}/empty: no image files in it"),
        (["encode", "{tmp}/damaged.npy", "-o", "{tmp}/o.npz"], "{tmp}/damaged.npy: not a readable .npy file"),
        (["encode", "{tmp}/array.npz", "-o", "{tmp}/o.npz"], "{tmp}/array.npz: not a readable .npz file"),
        (["encode", "{tmp}/objects.npy", "-o", "{tmp}/o.npz"], "{tmp}/objects.npy: not a readable .npy file"),
        (["encode", "{tmp}/nothing.npy", "-o", "{tmp}/o.npz"], "images have 0 rows; one call to model mnist/1 takes"),
        (["encode", "{tmp}/damaged.npz", "-o", "{tmp}/o.npz"], "{tmp}/damaged.npz: not a readable .npz file"),
        (["encode", "{tmp}/damaged.png", "-o", "{tmp}/o.npz"], "{tmp}/damaged.png: not a readable image"),
        (["encode", "{tmp}/two.npz", "-o", "{tmp}/o.npz"], "{tmp}/two.npz: no array named images; it has x, y"),
        (["decode", "{tmp}/damaged.png", "-o", "{tmp}/o.npz"], "{tmp}/damaged.png: latents are read from .npy and"),
        (["decode", "{tmp}/flat.npy", "-o", "{tmp}/o.npz"], "latents have shape (3,); model mnist/1 takes (20,)"),
        (["sample", "0", "-o", "{tmp}/o.npz"], "count is 0; one call to model mnist/1 takes 1 to"),
        (["sample", "1", "-o", "{tmp}/o.npz", "--model", "cat"], "there is no model 'cat'; this server has mnist"),
        (["sample", "1", "-o", "{tmp}/o.npz", "--root-certificates", "{tmp}/ca"], "{tmp}/ca: No such file"),
        (["sample", "1", "-o", "{tmp}/o.npz", "--token-file", "{tmp}/token"], "{tmp}/token: No such file"),
        (["sample", "1", "-o", "{tmp}/o.npz", "--prior", "fitted"], "model mnist/1 has no fitted prior"),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_nothing(run, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    for name in ("damaged.npy", "damaged.npz", "damaged.png"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 this is not what it seems")
    np.savez(tmp_path / "two.npz", x=np.zeros(1), y=np.zeros(1))
    np.save(tmp_path / "flat.npy", np.zeros((2, 3)))
    np.save(tmp_path / "nothing.npy", np.zeros((0, 28, 28)))
    np.save(tmp_path / "objects.npy", np.array([None]))
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros((1, 28, 28)))
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("vaeserve: " + words.format(tmp=tmp_path))
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample"], "required: count, -o/--output"),
        (["sample", "many", "-o", "x.npy"], "invalid int value: 'many'"),
        (["sample", "1", "-o", "x.npy", "--seed", "-1"], "'-1' is not an integer from 0 to 2**64 - 1"),
        (["sample", "1", "-o", "x.npy", "--timeout", "0"], "'0' is not a positive number of seconds"),
        (["sample", "1", "-o", "{tmp}/x.jpg"], "cannot write .jpg; name .npy or .npz or .png or a folder (no suffix)"),
        (["encode", "{tmp}", "-o", "{tmp}/codes"], "cannot write a file without suffix; name .npz or .npy"),
    ],
)
def test_wrong_usage_is_exit_status_2(run, tmp_path, arguments, words):
    status, out, err = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (status, out) == (2, "")
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "1", "-o", "{tmp}/full"], "{tmp}/full: exists and is not an empty folder; name another"),
        (["sample", "1", "-o", "{tmp}/none/x.npy"], "{tmp}/none/x.npy: there is no folder {tmp}/none; make it first"),
        (["encode", "{tmp}", "-o", "{tmp}/dir.npy"], "{tmp}/dir.npy: is a folder; name a file"),
    ],
)
def test_an_output_that_cannot_be_is_told_before_the_work(run, tmp_path, arguments, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "dir.npy").mkdir()
    status, out, err = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (status, out, err) == (1, "", f"vaeserve: {words.format(tmp=tmp_path)}\n")


def test_a_deadline_that_passed_names_the_flag(run, monkeypatch):
    def pass_the_deadline(_client):
        raise no_answer("here", 0.5)

    monkeypatch.setattr(Client, "models", pass_the_deadline)
    status, out, err = run("info")
    assert (status, out) == (1, "")
    assert err == "vaeserve: no answer from here within 0.5 s; give the call more time with --timeout\n"


def test_a_server_that_is_not_there_is_one_line(run, tmp_path):
    status, out, err = run("sample", 1, "-o", tmp_path / "x.npy", to="127.0.0.1:1")
    assert (status, out) == (1, "")
    assert err.startswith("vaeserve: no vaeserve server can be reached at 127.0.0.1:1 (Connection refused); check")
    assert err.count("\n") == 1


def test_without_pillow_image_files_are_told_what_to_install(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)  # what an import finds where it is not installed
    for arguments in (("encode", pictures, "-o", tmp_path / "o.npz"), ("sample", 1, "-o", tmp_path / "o.png")):
        status, _, err = run(*arguments)
        assert status == 1
        assert "image files need Pillow: pip install 'vaeserve[cli]'" in err
    assert run("sample", 1, "-o", tmp_path / "o.npy")[0] == 0


@pytest.mark.parametrize(
    ("name", "function", "error", "words"),
    [
        (
            "x.npy",
            "numpy.save",
            OSError("7840 requested and 0 written"),
            "7840 requested and 0 written; is the disk full?",
        ),
        ("x.npz", "numpy.savez", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        ("folder", "PIL.Image.Image.save", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(run, tmp_path, monkeypatch, *, name, function, error, words):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(function, full)
    status, out, err = run("sample", 2, "-o", tmp_path / name)
    assert (status, out) == (1, "")
    assert err == f"vaeserve: {tmp_path / name}: cannot be written ({words}); nothing half-written was left\n"
    assert not list(tmp_path.iterdir())


def test_files_are_replaced_whole_and_as_readable_as_any(run, tmp_path):
    output = tmp_path / "samples.npy"
    output.write_bytes(b"old")
    umask = os.umask(0o022)
    try:
        assert run("sample", 1, "-o", output)[0] == 0
        assert run("sample", 2, "-o", tmp_path / "folder")[0] == 0
    finally:
        os.umask(umask)
    assert output.stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    assert np.load(output).shape == (1, 1, 28, 28)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "samples.npy"]


def test_ctrl_c_ends_cleanly_and_leaves_nothing(tmp_path):
    arrived, release = threading.Event(), threading.Event()

    def hold(asked):
        if asked.method == "Sample":
            arrived.set()
            release.wait(30)

    with faulty_server() as server:
        server.service.hook = hold
        command = [
            sys.executable,
            "-m",
            "vaeserve",
            "sample",
            "1",
            "-o",
            f"{tmp_path}/x.npy",
            "--target",
            server.target,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert arrived.wait(30)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            release.set()
            process.kill()
    assert (process.returncode, out, err) == (130, "", "vaeserve: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_command_is_needed(capfd):
    with pytest.raises(SystemExit) as left:
        cli.main([])
    assert left.value.code == 2
    assert "required: COMMAND" in capfd.readouterr().err


def test_the_command_says_its_version():
    command = [sys.executable, "-m", "vaeserve", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("vaeserve ")
