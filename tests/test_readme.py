"""README's blocks do what they say. GPU blocks are only parsed: no GPU is here.

A block's info string says what it is: `python` runs against a server, `bash cli` runs as it stands, `bash train` with a
smaller model, `bash ladder` climbs its first step, `bash large` runs in small in training/test_large.py, `bash make` is
what .ci/run or a test here runs, `bash grpcurl` runs in the real one where it is there, else in ours.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from known_graphs import operators_read_once
from reflection_client import grpcurl
from serving import running_server
from vaeserve import Client
from vaeserve_server.settings import Settings, from_command_line

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\S*) ?(\S*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
TARGET = "127.0.0.1:50051"
SCRIPTS = Path(sys.executable).parent


def blocks(language: str, kind: str = "") -> list[str]:
    return [text for found, its_kind, text in BLOCKS if (found, its_kind) == (language, kind)]


def commands(kind: str) -> list[list[str]]:
    lines = "".join(blocks("bash", kind)).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str], folder: Path, **variables: str) -> None:
    script = SCRIPTS / words[0]
    result = subprocess.run(
        [str(script), *words[1:]],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}{result.stderr}"


def train(words: list[str]) -> None:
    """Run a command of `vaeserve-train` in this process, which has PyTorch at hand; test_release.py has the script."""
    from vaeserve_training.__main__ import main

    assert words[0] == "vaeserve-train"
    assert main(words[1:]) == 0, shlex.join(words)


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    known = {("python", "")} | {
        ("bash", kind) for kind in ("make", "cli", "train", "ladder", "large", "gpu", "docker", "grpcurl", "access")
    }
    assert {(language, kind) for language, kind, _ in BLOCKS} <= known


def test_python_blocks_run_against_a_server(models_dir: Path) -> None:
    assert blocks("python")
    names: dict[str, Any] = {}
    with running_server(models_dir, oip=True) as server:
        for text in blocks("python"):
            assert TARGET in text
            exec(compile(text.replace(TARGET, server.target), "README.md", "exec"), names)
    assert names["fresh"].shape == (64, 1, 28, 28)
    assert names["copies"].shape == (64, 1, 28, 28)
    assert np.array_equal(names["fresh"][:8], names["again"])
    assert names["between"].shape == (8, 1, 28, 28)
    assert np.array_equal(names["decoded"], np.rint(names["again"] * 255))


def test_command_line_blocks_run_as_they_stand(models_dir: Path, tmp_path: Path) -> None:
    assert commands("cli")
    with running_server(models_dir) as server:
        for words in commands("cli"):
            run([*words, "--target", server.target], tmp_path)
    assert np.load(tmp_path / "copies.npy").shape == (64, 1, 28, 28)


@pytest.mark.parametrize("real", [False, True])
def test_grpcurl_blocks_need_nothing_but_reflection(models_dir: Path, *, real: bool) -> None:
    if real and shutil.which("grpcurl") is None:
        pytest.skip("grpcurl is not on the path")
    with running_server(models_dir) as server, Client(server.target) as client:
        said = []
        for words in commands("grpcurl"):
            assert words[0] == "grpcurl"
            at_server = [word.replace(TARGET, server.target) for word in words]
            said.append(subprocess.check_output(at_server, text=True, timeout=60) if real else grpcurl(at_server[1:]))
        expected = client.sample(1, seed=7, dtype=np.uint8).images
    services, description, sample, health = said
    assert {"vaeserve.v1.VaeService", "grpc.health.v1.Health"} <= set(services.split())
    assert all(name in description for name in ("count", "seed", "temperature", "image_dtype"))
    images = json.loads(sample)["images"]
    assert base64.b64decode(images["data"]) == expected.tobytes()
    assert images["shape"] == ["1", "1", "28", "28"]
    assert json.loads(health) == {"status": "SERVING"}


def test_access_blocks_let_in_who_has_a_token(models_dir: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not there")
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    lines = "".join(blocks("bash", "access")).splitlines()
    (serve,) = (line for line in lines if line.startswith("vaeserve-server --"))
    before, after = lines[: lines.index(serve)], lines[lines.index(serve) + 1 :]

    def shell(line: str) -> None:
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"

    for line in before:
        shell(line)
    words = shlex.split(serve.replace("0.0.0.0", "127.0.0.1"))
    free = ["--port", "0", "--metrics-port", "0", "--device", "cpu", "--models", str(models_dir)]
    with subprocess.Popen(
        [str(SCRIPTS / words[0]), *words[1:], *free], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            target = server.stdout.readline().split(" on ")[1].split(" ")[0]
            assert after
            for line in after:
                shell(f"{line} --target {target}")
        finally:
            server.terminate()


def test_training_blocks_train_on_a_folder_and_publish(
    tmp_path: Path, test_images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my-images"
    folder.mkdir()
    for number, image in enumerate(test_images[:40, 0]):
        Image.fromarray(image).convert("RGB").resize((37, 45)).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    smaller = ["--optimiser.epochs", "1", "--model.channels", "8,16", "--model.hidden", "32", "--run.threads", "1"]
    with operators_read_once():
        for words in commands("train"):
            train([*words, *(smaller if words[1] == "fit" else [])])
    assert (tmp_path / "models" / "mine" / "1" / "model.json").is_file()


def test_the_ladder_block_climbs_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vaeserve_training.commands import ladder

    images = ["--data.dataset", "arrays", "--data.path", str(ROOT / "tests" / "data" / "mnist_subset.npz")]
    (words,) = commands("ladder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ladder, "QUICK", ladder.QUICK.model_copy(update={"constant_steps": 20}))
    train([*words, "--steps", "1", "--device", "cpu", *images])
    assert (tmp_path / "runs" / "ladder" / "report.html").is_file()
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", README)
    assert len(pictures) > 5
    assert all((ROOT / picture).stat().st_size < 60_000 for picture in pictures)


def test_make_blocks_are_run_by_ci_or_here() -> None:
    named = {tuple(words) for words in commands("make")}
    in_ci = set(re.findall(r"make [a-z0-9-]+", (ROOT / ".ci" / "run").read_text()))
    assert named
    assert {" ".join(words) for words in named} - in_ci == {"make serve"}


def test_make_serve_serves_until_it_is_asked_to_stop(models_dir: Path) -> None:
    environment = Path(sys.prefix)
    if not (environment / ".user").exists():
        pytest.skip("not in the environment that the Makefile makes")
    command = ["make", "--no-print-directory", "-o", f"{environment}/.user", "serve", f"VENV={environment}"]
    variables = {
        **os.environ,
        "VAESERVE_MODELS": str(models_dir),
        "VAESERVE_PORT": "0",
        "VAESERVE_METRICS": "false",
        "MAKEFLAGS": "",
        "ARGS": "",
    }
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    assert line.startswith("serving mnist/1 on 127.0.0.1:")


def test_gpu_blocks_name_flags_and_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = [words for words in commands("gpu") if words[0] == "pip"]
    servers = [words for words in commands("gpu") if words[0] == "vaeserve-server"]
    assert {extra for words in installs for extra in re.findall(r"[\w-]+", words[-1])[1:]} <= set(extras)
    assert [from_command_line(words[1:]) for words in servers] == [Settings(models=Path("models"), device="cuda")]


def test_docker_blocks_name_profiles_that_exist() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    assert commands("docker")
    profiles = [
        words[index + 1] for words in commands("docker") for index, word in enumerate(words) if word == "--profile"
    ]
    assert [profile for profile in profiles if not re.search(rf"profiles: \[.*\b{profile}\b", compose)] == []


def test_links_within_the_repository_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
