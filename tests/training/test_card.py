"""`vaeserve-train card`: what the bundle knows stands on the page, and nothing breaks out of its place."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving import running_server
from vaeserve.v1 import vae_pb2
from vaeserve_training import bundle, model_card
from vaeserve_training.__main__ import main


@pytest.fixture
def card(evaluated_models_dir: Path) -> vae_pb2.ModelCard:
    """The card of a model that was trained, evaluated and exported."""
    return bundle.read_card(evaluated_models_dir / "mnist" / "1")


def front_matter(text: str) -> dict[str, Any]:
    matter = re.match(r"---\n(.*?\n)---\n\n# ", text, re.DOTALL)
    assert matter is not None
    found: dict[str, Any] = yaml.safe_load(matter[1])
    return found


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n\n(.*?)(?=\n\n## |\n\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found[1]


def table(text: str) -> list[list[str]]:
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    return [[cell.strip() for cell in row] for row in rows]


def test_every_figure_stands_under_its_protocol(card: vae_pb2.ModelCard) -> None:
    evaluation = section(model_card.markdown(card), "Evaluation")
    first, second = card.evaluations
    assert table(evaluation)[0] == ["", "protocol 1", "protocol 2"]
    rows = {words: values for words, *values in table(evaluation)[2:]}
    assert rows == {
        "-ELBO": [f"{first.neg_elbo_nats:.6g}", f"{second.neg_elbo_nats:.6g}"],
        "rate": [f"{first.rate_nats:.6g}", f"{second.rate_nats:.6g}"],
        "distortion": [f"{first.distortion_nats:.6g}", f"{second.distortion_nats:.6g}"],
        "active units": [str(first.active_units), str(second.active_units)],
    }
    assert f"\n1. {first.protocol}\n2. {second.protocol}" in evaluation


def test_front_matter_is_what_model_hubs_read(card: vae_pb2.ModelCard) -> None:
    card.dataset.name = "mnist"
    matter = front_matter(model_card.markdown(card, licence="cc-by-4.0"))
    assert matter["license"] == "cc-by-4.0"
    assert matter["pipeline_tag"] == "unconditional-image-generation"
    assert matter["datasets"] == ["ylecun/mnist"]
    (index,) = matter["model-index"]
    assert index["name"] == "mnist"
    for result, entry in zip(index["results"], card.evaluations, strict=True):
        values = {metric["type"]: metric["value"] for metric in result["metrics"]}
        assert values["neg_elbo_nats"] == pytest.approx(entry.neg_elbo_nats, abs=1e-4)
        assert {metric["args"]["protocol"] for metric in result["metrics"]} == {entry.protocol}


def test_latents_parity_and_digests_are_those_of_the_bundle(card: vae_pb2.ModelCard) -> None:
    text = model_card.markdown(card)
    rows = table(section(text, "Latents"))[2:]
    kl_nats = card.latent_statistics.kl_nats
    assert [int(row[0]) for row in rows] == sorted(range(20), key=lambda latent: -kl_nats[latent])
    assert [row[1] for row in rows] == [f"{value:.3f}" for value in sorted(kl_nats, reverse=True)]
    parity = section(text, "Graphs and parity")
    assert [row[4] for row in table(parity)[2:]] == [f"{graph.parity[0].max_abs_error:.1e}" for graph in card.graphs]
    for digest in (card.digest, card.dataset.sha256, *(graph.sha256 for graph in card.graphs)):
        assert f"`{digest}`" in text


def test_what_else_a_bundle_may_hold_is_said(card: vae_pb2.ModelCard) -> None:
    text = model_card.markdown(card)
    assert "no, N(0, I) only" in text
    assert "fp16" not in text
    card.graphs.add(role=vae_pb2.GRAPH_ROLE_PRIOR, file="prior.onnx", sha256="ab")
    half = card.float16_graphs.add(role=vae_pb2.GRAPH_ROLE_ENCODER, file="encoder.fp16.onnx", sha256="cd")
    half.parity.add(provider="CPUExecutionProvider", max_abs_error=0.0123)
    text = model_card.markdown(card)
    assert "| fitted prior | yes |" in text
    assert 'prior="fitted"' in section(text, "How to call it")
    assert "| encoder | `encoder.fp16.onnx` | CPUExecutionProvider |  | 1.2e-02 |" in text


def test_its_python_runs_as_it_stands(card: vae_pb2.ModelCard, evaluated_models_dir: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", model_card.markdown(card), re.DOTALL)
    names: dict[str, Any] = {}
    with running_server(evaluated_models_dir) as server:
        exec(compile(code.replace("127.0.0.1:50051", server.target), "card", "exec"), names)
    assert names["fresh"].shape == names["copies"].shape == (16, *card.image_shape)


OBJECTIVES = {
    "elbo": ({}, "Minimised was distortion + rate, the negative evidence lower bound."),
    "beta": ({"beta": 4.0}, "Minimised was distortion + 4 x rate (with 1"),
    "iwae": ({"training_config_json": '{"objective": {"bound": "iwae", "samples": 50}}'}, "bound with 50 posterior"),
    "gaussian": (
        {"likelihood": vae_pb2.LIKELIHOOD_GAUSSIAN, "sigma": 0.125},
        "independent Gaussian pixels with standard deviation 0.125 on the 0..1 scale",
    ),
    "mse": ({"likelihood": vae_pb2.LIKELIHOOD_MSE}, "no likelihood, and the posterior collapses"),
}


@pytest.mark.parametrize(("fields", "words"), OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_objective_is_named_as_it_was(card: vae_pb2.ModelCard, fields: dict[str, Any], words: str) -> None:
    card.MergeFrom(vae_pb2.ModelCard(**fields))
    assert words in section(model_card.markdown(card), "Objective")


def test_what_is_not_known_is_said_to_be_missing(card: vae_pb2.ModelCard) -> None:
    for field in ("evaluations", "latent_statistics", "training_config_json", "tool_versions", "dataset", "created"):
        card.ClearField(field)
    text = model_card.markdown(card)
    matter = front_matter(text)
    assert not {"license", "datasets", "model-index"} & set(matter)
    assert section(text, "Evaluation").startswith("None: ")
    assert section(text, "Latents").startswith("No statistics: ")
    assert section(text, "Data").startswith("Not said: ")
    assert section(text, "Licence").startswith("Not said. ")


def test_no_name_breaks_out_of_its_place(card: vae_pb2.ModelCard) -> None:
    hostile = 'a|b `c`\n---\n# heading: "x" <b>'
    card.dataset.name = hostile
    card.evaluations[0].protocol = hostile
    card.training_config_json = '{"data": {"dataset": "```\\n# heading"}}'
    text = model_card.markdown(card, licence='mit"\nlicense: other')
    matter = front_matter(text)
    assert matter["license"] == 'mit"\nlicense: other'
    assert matter["model-index"][0]["results"][0]["dataset"]["name"] == hostile
    assert re.findall(r"^#+ (.*)", text, re.MULTILINE)[0] == "mnist, version 1"
    assert not re.search(r"^#+ heading", text, re.MULTILINE)
    assert "<b>" not in text.replace(r"\<b\>", "").split("---\n", 2)[2]


def test_command_writes_a_file_or_prints(evaluated_models_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """Of a model's folder it is the highest version, 10 and not 9."""
    for version in ("9", "10"):
        shutil.copytree(evaluated_models_dir / "mnist" / "1", tmp_path / "mnist" / version)
        path = tmp_path / "mnist" / version / "model.json"
        path.write_text(path.read_text().replace('"version": "1"', f'"version": "{version}"'))
    assert main(["card", str(tmp_path / "mnist")]) == 0
    printed = capsys.readouterr().out
    assert "\n# mnist, version 10\n" in printed
    output = tmp_path / "new" / "README.md"
    assert main(["card", str(tmp_path / "mnist" / "10"), "-o", str(output), "--licence", "mit"]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    assert output.read_text() == printed.replace("---\n", '---\nlicense: "mit"\n', 1).replace(
        section(printed, "Licence"), "mit. It covers the model; the data it was trained on have terms of their own."
    )


MISTAKES = {
    "nothing there": (None, "is no bundle (model.json is missing) and no model's folder with one"),
    "no JSON": ("{", "is damaged or no model card: "),
    "no text": (b"\xff", "is damaged or no model card: "),
    "another schema": ('{"schema_version": 2}', "has schema version 2; this release reads 1"),
    "a strange configuration": (
        '{"schema_version": 1, "training_config_json": "x"}',
        "training_config_json is no JSON",
    ),
    "another configuration": ('{"schema_version": 1, "training_config_json": "3"}', "is int; expected an object"),
}


@pytest.mark.parametrize(("content", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_bundle_that_cannot_be_read_is_one_line(
    content: str | bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "model.json").write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(["card", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"vaeserve-train card: {re.escape(str(tmp_path))}.*{re.escape(words)}.*\n", said.err)
