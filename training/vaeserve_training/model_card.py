"""A bundle as a page for people: what `model.json` knows of a model, as a model card in Markdown.

The form is that of the model cards which model hubs show (Mitchell et al. 2019): front matter in YAML, then sections.
Every figure comes from the bundle, so that the page cannot say more than was measured; what a bundle does not know,
such as a licence, is asked for or said to be missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vaeserve.v1 import vae_pb2
from vaeserve_training import report

_LATENTS_SHOWN = 32
_NO_LIKELIHOOD = "mean squared error + KL, as explanations write it: no likelihood, and the posterior collapses"
_LIKELIHOODS: dict[int, str] = {
    vae_pb2.LIKELIHOOD_BERNOULLI: "independent Bernoulli pixels",
    vae_pb2.LIKELIHOOD_GAUSSIAN: "independent Gaussian pixels",
    vae_pb2.LIKELIHOOD_MSE: _NO_LIKELIHOOD,
}
_INPUTS: dict[int, str] = {
    vae_pb2.ENCODER_INPUT_BINARISED: "images whose pixels are 0 or 1",
    vae_pb2.ENCODER_INPUT_GREY: "images with intensities in 0..1",
}
_HUB_DATASETS = {"mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist"}
_TASK = "unconditional-image-generation"
_ROLES: dict[int, str] = {
    vae_pb2.GRAPH_ROLE_ENCODER: "encoder",
    vae_pb2.GRAPH_ROLE_DECODER: "decoder",
    vae_pb2.GRAPH_ROLE_PRIOR: "fitted prior",
}


def markdown(card: vae_pb2.ModelCard, *, licence: str = "") -> str:
    """Return the model card of a bundle. `licence` is the SPDX identifier of the model's own licence, '' if unsaid.

    ValueError if the bundle's training configuration is no JSON object.
    """
    config = _config(card)
    sections = [
        _front_matter(card, licence),
        f"# {card.name}, version {card.version}",
        _summary(card),
        "## How to call it",
        _calls(card),
        "## Intended use and limits",
        _limits(card),
        "## Data",
        _data(card),
        "## Objective",
        _objective(card, config),
        "## Evaluation",
        _evaluation(card),
        "## Latents",
        _latents(card.latent_statistics),
        "## Graphs and parity",
        _parity(card),
        "## Training configuration",
        _training(card, config),
        "## Licence",
        _licence(licence),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(card: vae_pb2.ModelCard, licence: str) -> str:
    # JSON's strings are YAML's, and so are its lists: nothing that a name holds can break out of them.
    lines = [f"license: {_json(licence)}"] if licence else []
    lines += ["library_name: vaeserve", f"pipeline_tag: {_TASK}", f"model_name: {_json(card.name)}"]
    lines.append(f"tags: {_json(['variational-autoencoder', 'vae', 'onnx', 'onnxruntime', 'grpc', 'vaeserve'])}")
    if card.dataset.name in _HUB_DATASETS:
        lines.append(f"datasets: {_json([_HUB_DATASETS[card.dataset.name]])}")
    if card.evaluations:
        lines += ["model-index:", f"- name: {_json(card.name)}", "  results:"]
    for entry in card.evaluations:
        dataset = {"type": _HUB_DATASETS.get(card.dataset.name, "other"), "name": card.dataset.name, "split": "test"}
        metrics = [
            {"type": name, "name": words, "value": _rounded(value), "args": {"protocol": entry.protocol}}
            for words, name, value in _figures(entry)
        ]
        lines += [f"  - task: {_json({'type': _TASK})}", f"    dataset: {_json(dataset)}", "    metrics:"]
        lines += [f"    - {_json(metric)}" for metric in metrics]
    return "\n".join(["---", *lines, "---"])


def _summary(card: vae_pb2.ModelCard) -> str:
    rows = {
        "images": f"{_by(card.image_shape)} (channels x height x width)",
        "latents": _by(card.latent_shape),
        "p(x given z)": _likelihood(card),
        "the encoder takes": _INPUTS.get(card.encoder_input, "not said"),
        "fitted prior": "yes" if _has_prior(card) else "no, N(0, I) only",
        "made": card.created.ToDatetime().strftime("%Y-%m-%d %H:%M UTC") if card.HasField("created") else "not said",
        "digest": f"`{card.digest}`",
    }
    return (
        f"A variational autoencoder of {_by(card.image_shape)} images: its encoder maps an image to the mean and the "
        "standard deviation of each latent, its decoder maps latents to images, and latents drawn from the prior give "
        "new images. Encoder and decoder are ONNX graphs, served by vaeserve over gRPC.\n\n"
        + _table(("", ""), rows.items())
    )


def _calls(card: vae_pb2.ModelCard) -> str:
    model, shape = f"{card.name}/{card.version}", ", ".join(map(str, card.image_shape))
    binarised = card.encoder_input == vae_pb2.ENCODER_INPUT_BINARISED
    prior = ', prior="fitted"' if _has_prior(card) else ""
    return f"""\
```bash
vaeserve-server --models models    # this bundle is models/{model}
```

```python
from vaeserve import Client

with Client("127.0.0.1:50051") as client:
    fresh = client.sample(16, seed=0, model="{model}"{prior}).images  # (16, {shape}), float32 in 0..1
    codes = client.encode({'(fresh > 0.5).astype("f4")' if binarised else "fresh"}, model="{model}")
    copies = client.decode(codes)  # codes.mean, and only by the model they came from
```"""


def _limits(card: vae_pb2.ModelCard) -> str:
    data = _words(card.dataset.name) or "its training data"
    items = [
        f"Meant for images like those of {data}: their codes, their reconstructions, and new ones of their kind.",
        "Not meant for other images. The encoder answers any image of the right shape and has no way to decline; the "
        "server's latent drift metrics tell when what is sent differs from what the figures below are of.",
        "A reconstruction is the mean of many possible images, so it is smoother than an image. It is no copy: do not "
        "use it where details decide.",
        f"New images resemble the training images, with whatever is missing or over-represented among the "
        f"{card.dataset.train_images} of them. Nothing here measures fairness, privacy or memorisation.",
        "Latents have no meaning beside another model's decoder: keep the digest with them.",
    ]
    if card.encoder_input == vae_pb2.ENCODER_INPUT_BINARISED:
        items.append("The figures hold for pixels that are 0 or 1; grey images work and cost what the table says.")
    if card.likelihood == vae_pb2.LIKELIHOOD_MSE:
        items.append(f"The objective is {_NO_LIKELIHOOD}. The model is for seeing that.")
    return "\n".join(f"- {item}" for item in items)


def _data(card: vae_pb2.ModelCard) -> str:
    dataset = card.dataset
    return (
        f"{_words(dataset.name) or 'Not said'}: {dataset.train_images} training images and {dataset.test_images} test "
        f"images. SHA-256 over the training images as they were used: `{dataset.sha256}`."
    )


def _objective(card: vae_pb2.ModelCard, config: Mapping[str, Any]) -> str:
    objective = config.get("objective", {})
    if card.likelihood == vae_pb2.LIKELIHOOD_MSE:
        return f"Minimised was {_NO_LIKELIHOOD}; the rate's weight was {card.beta:g}."
    if objective.get("bound") == "iwae":
        bound = f"the importance-weighted bound with {objective.get('samples')} posterior samples (Burda et al. 2016)"
    elif card.beta == 1:
        bound = "distortion + rate, the negative evidence lower bound"
    else:
        bound = f"distortion + {card.beta:g} x rate (with 1 it were the negative evidence lower bound)"
    return (
        f"Minimised was {bound}. Distortion is -log p(x given z) under {_likelihood(card)}; rate is the KL divergence "
        "of q(z given x), a diagonal Gaussian, from the prior N(0, I). Both in nats per image."
    )


def _evaluation(card: vae_pb2.ModelCard) -> str:
    if not card.evaluations:
        return "None: the bundle was exported without an evaluation (`vaeserve-train evaluate`, then `export`)."
    header = ["", *(f"protocol {number}" for number in range(1, len(card.evaluations) + 1))]
    columns = [{words: value for words, _, value in _figures(entry)} for entry in card.evaluations]
    rows = [
        (words, *(f"{column[words]:.6g}" if words in column else "" for column in columns))
        for words in report.FIGURES
        if any(words in column for column in columns)
    ]
    protocols = [f"{number}. {_words(entry.protocol)}" for number, entry in enumerate(card.evaluations, start=1)]
    caution = "Nats per image, but for active units and bits. Figures of different protocols do not compare."
    return "\n\n".join([_table(header, rows), caution + " The protocols:", "\n".join(protocols)])


def _latents(statistics: vae_pb2.LatentStatistics) -> str:
    count = len(statistics.kl_nats)
    if not count:
        return "No statistics: the bundle was exported without an evaluation."
    order = sorted(range(count), key=lambda latent: -statistics.kl_nats[latent])
    columns = (statistics.kl_nats, statistics.mean_posterior_stddev, statistics.mean, statistics.stddev)
    rows = [(str(latent), *(f"{column[latent]:.3f}" for column in columns)) for latent in order[:_LATENTS_SHOWN]]
    shown = f"the {_LATENTS_SHOWN} with the largest KL of {count}" if count > _LATENTS_SHOWN else f"all {count}"
    words = (
        f"Over the test images under protocol 1, by falling KL, {shown}; {sum(statistics.kl_nats):.2f} nats in all. A "
        "KL of about 0 is a latent that is not used; an aggregate posterior far from mean 0 and standard deviation 1 "
        "is where samples from N(0, I) miss what images encode to."
    )
    header = ("latent", "KL (nats)", "mean posterior stddev", "aggregate mean", "aggregate stddev")
    return f"{words}\n\n{_table(header, rows)}"


def _parity(card: vae_pb2.ModelCard) -> str:
    graphs, rows = [*card.graphs, *card.float16_graphs], []
    for graph in graphs:
        for parity in graph.parity:
            sizes = ", ".join(map(str, parity.batch_sizes))
            errors = (f"{error:.1e}" for error in (parity.max_abs_error, parity.max_rel_error, parity.max_batch_error))
            rows.append((_ROLES.get(graph.role, ""), f"`{graph.file}`", parity.provider, sizes, *errors))
    header = ("graph", "file", "provider", "batch sizes", "absolute", "relative", "between batch sizes")
    digests = [f"- `{graph.file}`: opset {graph.opset}, SHA-256 `{graph.sha256}`" for graph in graphs]
    words = (
        "The largest differences from PyTorch in float32 that were measured before the bundle was published (relative: "
        "of values from 0.001 up; between batch sizes: of ONNX Runtime from itself)."
    )
    return "\n\n".join([words, _table(header, rows), "\n".join(digests)])


def _training(card: vae_pb2.ModelCard, config: Mapping[str, Any]) -> str:
    tools = ", ".join(f"{tool} {_words(version)}" for tool, version in sorted(card.tool_versions.items()))
    lines = [f"Made with {tools or 'tools that it does not name'}.", ""]
    for section, fields in config.items():
        values = fields if isinstance(fields, dict) else {"": fields}
        said = " ".join(f"{name}={_json(value)}" for name, value in values.items() if value is not None)
        lines.append(f"- {_words(section)}: `{said.replace('`', '')}`")
    return "\n".join(lines)


def _licence(licence: str) -> str:
    if licence:
        return f"{_words(licence)}. It covers the model; the data it was trained on have terms of their own."
    return (
        "Not said. Whoever publishes the model states it (`vaeserve-train card --licence`), with regard to the terms "
        "of the data it was trained on. The licence of vaeserve is that of the software, not of models made with it."
    )


def _likelihood(card: vae_pb2.ModelCard) -> str:
    sigma = f" with standard deviation {card.sigma:.4g} on the 0..1 scale" if card.HasField("sigma") else ""
    return _LIKELIHOODS.get(card.likelihood, "not said") + sigma


def _figures(entry: vae_pb2.Evaluation) -> Iterator[tuple[str, str, float]]:
    """Yield what an evaluation found: in words, by the name in vae.proto, and the value."""
    for words, name in report.FIGURES.items():
        if entry.HasField(name):
            yield words, name, getattr(entry, name)


def _config(card: vae_pb2.ModelCard) -> Mapping[str, Any]:
    try:
        config = json.loads(card.training_config_json or "{}")
    except ValueError as error:
        raise ValueError(f"training_config_json is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise TypeError(f"training_config_json is {type(config).__name__}; expected an object")
    return config


def _has_prior(card: vae_pb2.ModelCard) -> bool:
    return any(graph.role == vae_pb2.GRAPH_ROLE_PRIOR for graph in card.graphs)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _words(text: str) -> str:
    """Return text from a bundle as one line that Markdown takes for words."""
    line = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in line)


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _rounded(value: float) -> float | int:
    return value if isinstance(value, int) else round(value, 4)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
