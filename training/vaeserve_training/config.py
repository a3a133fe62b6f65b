"""One frozen description of a training run: every figure that changes its result, and the presets people start from.

The same object is the command line's flags, the checkpoint's `config.json` and the card's `training_config_json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Dataset = Literal["mnist", "fashion-mnist", "folder", "arrays", "binarised-mnist"]
LikelihoodName = Literal["bernoulli", "gaussian", "mse"]
BoundName = Literal["elbo", "iwae"]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
ImageShape = tuple[Positive, Positive, Positive]

# Where results cannot depend on a field, a run may be resumed under another value of it. The data's SHA-256 is checked
# apart, so it does not matter where they lie.
FREE_TO_CHANGE = frozenset({"data.path", "data.cache_dir", "run.keep_checkpoints", "run.monitor_images"})


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names what was given, what was expected and what to do."""


class Section(BaseModel):
    """A frozen part of the configuration; unknown fields are refused, field docstrings are the flags' help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which images, and how they are brought to one shape."""

    dataset: Dataset = "mnist"
    """The kind of data set; folder, arrays and binarised-mnist need a path."""
    path: Path | None = None
    """A folder of images, a .npy/.npz file, or a folder that holds the four MNIST files."""
    cache_dir: Path | None = None
    """Where downloads are kept; unset: the user's cache folder."""
    image_shape: ImageShape = (1, 28, 28)
    """Channels, height and width that every image is brought to, e.g. [3,32,32]."""
    on_bad_image: Literal["skip", "fail"] = "fail"
    """What an unreadable image file does: it is named and left out, or it stops the run."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the images held out, where the data set brings no test set of its own."""
    seed: Count = 0
    """Seed of that split."""
    limit_train: Positive | None = None
    """Use only the first so many training images."""
    limit_test: Positive | None = None
    """Use only the first so many test images."""


class ModelConfig(Section):
    """Encoder and decoder: strided convolutions, then dense layers, and the mirror image of both."""

    latent_size: Positive = 20
    """Number of latents D."""
    channels: tuple[Positive, ...] = (32, 64)
    """Output channels of each convolution (kernel 4, stride 2, padding 1); [] makes a multilayer perceptron."""
    blocks: Count = 0
    """Gated residual blocks behind each convolution, and before each of the decoder's."""
    hidden: tuple[Positive, ...] = (256,)
    """Widths of the dense layers between the convolutions and the latents."""
    activation: Literal["silu", "relu", "gelu", "tanh"] = "silu"
    """Non-linearity after each layer but the last."""
    initialisation: Literal["pytorch", "glorot"] = "pytorch"
    """First weights: PyTorch's own, or uniform after Glorot and Bengio 2010 with biases of 0."""

    @model_validator(mode="after")
    def _blocks_have_a_place(self) -> ModelConfig:
        if self.blocks and not self.channels:
            raise ValueError(f"blocks is {self.blocks}, but there are no channels to put them behind: give some, or 0")
        return self


class ObjectiveConfig(Section):
    """What is minimised: distortion + beta * rate, or the importance-weighted bound."""

    likelihood: LikelihoodName = "bernoulli"
    """The observation model p(x|z); mse is no normalised likelihood and collapses, it is kept to show that."""
    sigma: Literal["learned", "optimal"] = "learned"
    """Gaussian only: one standard deviation for all pixels, by gradient descent or in closed form."""
    bound: BoundName = "elbo"
    """elbo, or iwae: minus the logarithm of the mean of k importance weights (Burda et al. 2016, equation 8)."""
    samples: Positive = 1
    """Posterior samples k of each image in a step; the elbo averages their distortions, iwae their weights."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the rate; 1 is the evidence lower bound."""
    rate_warmup_steps: Count = 0
    """Steps over which the weight of the rate rises linearly from 0 to beta."""

    @model_validator(mode="after")
    def _bound_is_one(self) -> ObjectiveConfig:
        if self.bound == "iwae" and (self.likelihood == "mse" or self.beta != 1 or self.rate_warmup_steps):
            raise ValueError(
                f"the iwae bound has no rate to weigh and needs a likelihood; given are likelihood {self.likelihood}, "
                f"beta {self.beta:g} and rate_warmup_steps {self.rate_warmup_steps}: use bernoulli or gaussian, 1 and "
                "0, or the bound elbo"
            )
        return self


class OptimiserConfig(Section):
    """How it is minimised, counted in epochs and steps, never in seconds."""

    algorithm: Literal["adamw", "adam"] = "adamw"
    """The optimiser."""
    epochs: Positive = 3
    """Passes over the training images."""
    batch_size: Positive = 128
    """Images per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 4e-3
    """Highest learning rate."""
    warmup_steps: Count = 200
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "constant", "iwae"] = "cosine"
    """What the learning rate does after the warm-up; iwae: times 10^(-i/7) for 3^i epochs, i = 0, 1, 2 ...

    After 1, 4, 13, 40, 121, 364, 1093 and 3280 epochs such a stage ends; the paper (Burda et al. 2016) has 3280. The
    schedule does not depend on the number of epochs, so a shorter run is a longer one's beginning.
    """
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Cosine only: the last step's learning rate as a share of the highest."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled for adamw, an L2 penalty for adam."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """What Adam adds to the root of its second moment (beta1 is 0.9, beta2 0.999)."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 50.0
    """The gradient's norm is clipped to this."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the weights that is evaluated and exported; 0 switches it off."""


class RunConfig(Section):
    """Where it runs, from which seed, and what is kept."""

    seed: Count = 0
    """Seed of the initial weights, the shuffling, the binarisation and the posterior noise."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where it works."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """auto computes the networks in bf16 on CUDA and in float32 on a CPU; the loss terms are always float32."""
    threads: Positive | None = None
    """CPU threads; unset: PyTorch's own choice. Bit-identical resuming needs the same number."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints stay on disk."""
    monitor_images: Count = 2000
    """Evaluate the first so many test images after each epoch; 0 switches it off."""


class TrainConfig(Section):
    """A whole run. `to_json` and `from_json` are inverse to each other."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _shapes_fit(self) -> TrainConfig:
        check_image_shape(self.data.image_shape, self.model.channels)
        return self

    def to_json(self) -> str:
        """Return the configuration as indented JSON."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "the configuration") -> TrainConfig:
        """Read what `to_json` wrote, or any part of it; ConfigError naming `source` and each wrong field."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"{source}: {describe(error)}") from None

    def with_changes(self, **sections: dict[str, Any]) -> TrainConfig:
        """Return a copy with some fields changed, e.g. `with_changes(optimiser={"epochs": 3})`, validated again."""
        values = self.model_dump()
        for section, changes in sections.items():
            values[section] = values[section] | changes
        try:
            return TrainConfig.model_validate(values)
        except ValidationError as error:
            raise ConfigError(describe(error)) from None


class PriorConfig(Section):
    """The flow that is fitted to a trained model's aggregate posterior, and how."""

    couplings: Positive = 8
    """Affine couplings, each followed by a permutation of the latents."""
    hidden: Positive = 128
    """Width of the two hidden layers in each coupling."""
    steps: Positive = 4000
    """Steps of the fit; its learning rate falls to 0 along a cosine."""
    batch_size: Positive = 512
    """Latents per step, each from the posterior of another training image."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Highest learning rate."""
    seed: Count = 0
    """Seed of the flow's weights and permutations, the binarisation and the latents."""


def check_image_shape(image_shape: tuple[int, int, int], channels: tuple[int, ...]) -> None:
    """Raise ConfigError unless height and width survive one halving per convolution."""
    factor = 2 ** len(channels)
    _, height, width = image_shape
    if height % factor or width % factor:
        raise ConfigError(
            f"image_shape is {list(image_shape)}; with {len(channels)} convolutions that halve it, height and width "
            f"must be multiples of {factor}: choose such a shape, or other model.channels"
        )


def describe(error: ValidationError) -> str:
    """Return pydantic's report as one line: each wrong field, what is wrong and what was given."""
    problems = []
    for detail in error.errors(include_url=False):
        field = ".".join(str(part) for part in detail["loc"])
        # "Value error, ..." is pydantic's prefix before this module's own words, which name what was given themselves.
        message = detail["msg"].removeprefix("Value error, ")
        given = "" if detail["type"] in {"missing", "value_error", "json_invalid"} else f" (given {detail['input']!r})"
        problems.append(f"{field}: {message}{given}" if field else f"{message}{given}")
    return "; ".join(problems)


def differences(first: TrainConfig, second: TrainConfig) -> list[str]:
    """Return the fields, e.g. `optimiser.epochs`, in which two configurations would give different runs."""
    one, two = first.model_dump(), second.model_dump()
    fields = [f"{section}.{field}" for section, values in one.items() for field in values]
    return [
        name
        for name in fields
        for section, field in [name.split(".")]
        if name not in FREE_TO_CHANGE and one[section][field] != two[section][field]
    ]


PRESETS: dict[str, TrainConfig] = {
    "mnist": TrainConfig(),
    "mnist-mlp": TrainConfig(
        model=ModelConfig(channels=(), hidden=(400,)),
        optimiser=OptimiserConfig(epochs=20, learning_rate=1e-3),
    ),
    "rgb": TrainConfig(
        data=DataConfig(dataset="folder", image_shape=(3, 32, 32)),
        model=ModelConfig(channels=(64, 128, 256), hidden=(512,), latent_size=64),
        objective=ObjectiveConfig(likelihood="gaussian"),
        optimiser=OptimiserConfig(epochs=50, learning_rate=1e-3),
    ),
    # For a GPU: run.precision "auto" computes the networks in bf16 there, and the data lie on the device.
    "large": TrainConfig(
        model=ModelConfig(channels=(64, 128), blocks=3, hidden=(512,), latent_size=40),
        objective=ObjectiveConfig(rate_warmup_steps=5000),
        optimiser=OptimiserConfig(
            epochs=400, batch_size=256, learning_rate=1e-3, warmup_steps=1000, weight_decay=1e-2, max_grad_norm=100.0
        ),
    ),
    # Burda, Grosse and Salakhutdinov 2016, section 5 and appendix: the model with one stochastic layer.
    "iwae-paper": TrainConfig(
        model=ModelConfig(channels=(), hidden=(200, 200), latent_size=50, activation="tanh", initialisation="glorot"),
        objective=ObjectiveConfig(bound="iwae"),
        optimiser=OptimiserConfig(
            algorithm="adam",
            epochs=3280,
            batch_size=20,
            learning_rate=1e-3,
            warmup_steps=0,
            schedule="iwae",
            epsilon=5e-6,  # the paper's 1e-4 belongs to gradients summed, not averaged, over 20 images
            max_grad_norm=1e6,  # the paper does not clip
            ema_decay=0.0,
        ),
    ),
}


def preset(name: str) -> TrainConfig:
    """Return the preset of that name; ConfigError listing the names if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
