import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]

class Prior(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIOR_UNSPECIFIED: _ClassVar[Prior]
    PRIOR_STANDARD_NORMAL: _ClassVar[Prior]
    PRIOR_FITTED: _ClassVar[Prior]

class Likelihood(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LIKELIHOOD_UNSPECIFIED: _ClassVar[Likelihood]
    LIKELIHOOD_BERNOULLI: _ClassVar[Likelihood]
    LIKELIHOOD_GAUSSIAN: _ClassVar[Likelihood]
    LIKELIHOOD_MSE: _ClassVar[Likelihood]

class EncoderInput(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODER_INPUT_UNSPECIFIED: _ClassVar[EncoderInput]
    ENCODER_INPUT_BINARISED: _ClassVar[EncoderInput]
    ENCODER_INPUT_GREY: _ClassVar[EncoderInput]

class GraphRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRAPH_ROLE_UNSPECIFIED: _ClassVar[GraphRole]
    GRAPH_ROLE_ENCODER: _ClassVar[GraphRole]
    GRAPH_ROLE_DECODER: _ClassVar[GraphRole]
    GRAPH_ROLE_PRIOR: _ClassVar[GraphRole]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_FLOAT16: DataType
PRIOR_UNSPECIFIED: Prior
PRIOR_STANDARD_NORMAL: Prior
PRIOR_FITTED: Prior
LIKELIHOOD_UNSPECIFIED: Likelihood
LIKELIHOOD_BERNOULLI: Likelihood
LIKELIHOOD_GAUSSIAN: Likelihood
LIKELIHOOD_MSE: Likelihood
ENCODER_INPUT_UNSPECIFIED: EncoderInput
ENCODER_INPUT_BINARISED: EncoderInput
ENCODER_INPUT_GREY: EncoderInput
GRAPH_ROLE_UNSPECIFIED: GraphRole
GRAPH_ROLE_ENCODER: GraphRole
GRAPH_ROLE_DECODER: GraphRole
GRAPH_ROLE_PRIOR: GraphRole

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ModelRef(_message.Message):
    __slots__ = ("name", "version", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    digest: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("model", "images", "want_latents", "seed", "first_row")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    WANT_LATENTS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    images: Tensor
    want_latents: bool
    seed: int
    first_row: int
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., images: _Optional[_Union[Tensor, _Mapping]] = ..., want_latents: bool = ..., seed: _Optional[int] = ..., first_row: _Optional[int] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("model", "mean", "stddev", "latents", "seed")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STDDEV_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    mean: Tensor
    stddev: Tensor
    latents: Tensor
    seed: int
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., mean: _Optional[_Union[Tensor, _Mapping]] = ..., stddev: _Optional[_Union[Tensor, _Mapping]] = ..., latents: _Optional[_Union[Tensor, _Mapping]] = ..., seed: _Optional[int] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("model", "latents", "image_dtype")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    latents: Tensor
    image_dtype: DataType
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., latents: _Optional[_Union[Tensor, _Mapping]] = ..., image_dtype: _Optional[_Union[DataType, str]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("model", "images")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    images: Tensor
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., images: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class SampleRequest(_message.Message):
    __slots__ = ("model", "count", "seed", "first_row", "temperature", "prior", "want_latents", "image_dtype")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    PRIOR_FIELD_NUMBER: _ClassVar[int]
    WANT_LATENTS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    count: int
    seed: int
    first_row: int
    temperature: float
    prior: Prior
    want_latents: bool
    image_dtype: DataType
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., count: _Optional[int] = ..., seed: _Optional[int] = ..., first_row: _Optional[int] = ..., temperature: _Optional[float] = ..., prior: _Optional[_Union[Prior, str]] = ..., want_latents: bool = ..., image_dtype: _Optional[_Union[DataType, str]] = ...) -> None: ...

class SampleResponse(_message.Message):
    __slots__ = ("model", "images", "latents", "seed")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    images: Tensor
    latents: Tensor
    seed: int
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., images: _Optional[_Union[Tensor, _Mapping]] = ..., latents: _Optional[_Union[Tensor, _Mapping]] = ..., seed: _Optional[int] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("card", "serving")
    CARD_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    card: ModelCard
    serving: Serving
    def __init__(self, card: _Optional[_Union[ModelCard, _Mapping]] = ..., serving: _Optional[_Union[Serving, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[GetModelResponse]
    def __init__(self, models: _Optional[_Iterable[_Union[GetModelResponse, _Mapping]]] = ...) -> None: ...

class Serving(_message.Message):
    __slots__ = ("provider", "requested_device", "fell_back_to_cpu", "max_rows_per_call", "precision")
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_DEVICE_FIELD_NUMBER: _ClassVar[int]
    FELL_BACK_TO_CPU_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_PER_CALL_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    provider: str
    requested_device: str
    fell_back_to_cpu: bool
    max_rows_per_call: int
    precision: DataType
    def __init__(self, provider: _Optional[str] = ..., requested_device: _Optional[str] = ..., fell_back_to_cpu: bool = ..., max_rows_per_call: _Optional[int] = ..., precision: _Optional[_Union[DataType, str]] = ...) -> None: ...

class ModelCard(_message.Message):
    __slots__ = ("schema_version", "name", "version", "digest", "image_shape", "latent_shape", "likelihood", "sigma", "beta", "encoder_input", "dataset", "evaluations", "latent_statistics", "graphs", "training_config_json", "tool_versions", "created", "float16_graphs")
    class ToolVersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SHAPE_FIELD_NUMBER: _ClassVar[int]
    LATENT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    LIKELIHOOD_FIELD_NUMBER: _ClassVar[int]
    SIGMA_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    ENCODER_INPUT_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    LATENT_STATISTICS_FIELD_NUMBER: _ClassVar[int]
    GRAPHS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    TOOL_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    FLOAT16_GRAPHS_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    name: str
    version: str
    digest: str
    image_shape: _containers.RepeatedScalarFieldContainer[int]
    latent_shape: _containers.RepeatedScalarFieldContainer[int]
    likelihood: Likelihood
    sigma: float
    beta: float
    encoder_input: EncoderInput
    dataset: Dataset
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    latent_statistics: LatentStatistics
    graphs: _containers.RepeatedCompositeFieldContainer[Graph]
    training_config_json: str
    tool_versions: _containers.ScalarMap[str, str]
    created: _timestamp_pb2.Timestamp
    float16_graphs: _containers.RepeatedCompositeFieldContainer[Graph]
    def __init__(self, schema_version: _Optional[int] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., image_shape: _Optional[_Iterable[int]] = ..., latent_shape: _Optional[_Iterable[int]] = ..., likelihood: _Optional[_Union[Likelihood, str]] = ..., sigma: _Optional[float] = ..., beta: _Optional[float] = ..., encoder_input: _Optional[_Union[EncoderInput, str]] = ..., dataset: _Optional[_Union[Dataset, _Mapping]] = ..., evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ..., latent_statistics: _Optional[_Union[LatentStatistics, _Mapping]] = ..., graphs: _Optional[_Iterable[_Union[Graph, _Mapping]]] = ..., training_config_json: _Optional[str] = ..., tool_versions: _Optional[_Mapping[str, str]] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., float16_graphs: _Optional[_Iterable[_Union[Graph, _Mapping]]] = ...) -> None: ...

class Dataset(_message.Message):
    __slots__ = ("name", "sha256", "train_images", "test_images")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    TRAIN_IMAGES_FIELD_NUMBER: _ClassVar[int]
    TEST_IMAGES_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    train_images: int
    test_images: int
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., train_images: _Optional[int] = ..., test_images: _Optional[int] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("protocol", "images", "encoder_input", "neg_elbo_nats", "rate_nats", "distortion_nats", "loss", "iw_nll_nats", "iw_samples", "bits_per_dim", "active_units")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    ENCODER_INPUT_FIELD_NUMBER: _ClassVar[int]
    NEG_ELBO_NATS_FIELD_NUMBER: _ClassVar[int]
    RATE_NATS_FIELD_NUMBER: _ClassVar[int]
    DISTORTION_NATS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    IW_NLL_NATS_FIELD_NUMBER: _ClassVar[int]
    IW_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_DIM_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_UNITS_FIELD_NUMBER: _ClassVar[int]
    protocol: str
    images: int
    encoder_input: EncoderInput
    neg_elbo_nats: float
    rate_nats: float
    distortion_nats: float
    loss: float
    iw_nll_nats: float
    iw_samples: int
    bits_per_dim: float
    active_units: int
    def __init__(self, protocol: _Optional[str] = ..., images: _Optional[int] = ..., encoder_input: _Optional[_Union[EncoderInput, str]] = ..., neg_elbo_nats: _Optional[float] = ..., rate_nats: _Optional[float] = ..., distortion_nats: _Optional[float] = ..., loss: _Optional[float] = ..., iw_nll_nats: _Optional[float] = ..., iw_samples: _Optional[int] = ..., bits_per_dim: _Optional[float] = ..., active_units: _Optional[int] = ...) -> None: ...

class LatentStatistics(_message.Message):
    __slots__ = ("mean", "stddev", "mean_posterior_stddev", "kl_nats")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STDDEV_FIELD_NUMBER: _ClassVar[int]
    MEAN_POSTERIOR_STDDEV_FIELD_NUMBER: _ClassVar[int]
    KL_NATS_FIELD_NUMBER: _ClassVar[int]
    mean: _containers.RepeatedScalarFieldContainer[float]
    stddev: _containers.RepeatedScalarFieldContainer[float]
    mean_posterior_stddev: _containers.RepeatedScalarFieldContainer[float]
    kl_nats: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, mean: _Optional[_Iterable[float]] = ..., stddev: _Optional[_Iterable[float]] = ..., mean_posterior_stddev: _Optional[_Iterable[float]] = ..., kl_nats: _Optional[_Iterable[float]] = ...) -> None: ...

class Graph(_message.Message):
    __slots__ = ("role", "file", "sha256", "opset", "parity")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OPSET_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    role: GraphRole
    file: str
    sha256: str
    opset: int
    parity: _containers.RepeatedCompositeFieldContainer[Parity]
    def __init__(self, role: _Optional[_Union[GraphRole, str]] = ..., file: _Optional[str] = ..., sha256: _Optional[str] = ..., opset: _Optional[int] = ..., parity: _Optional[_Iterable[_Union[Parity, _Mapping]]] = ...) -> None: ...

class Parity(_message.Message):
    __slots__ = ("provider", "batch_sizes", "max_abs_error", "max_rel_error", "max_batch_error")
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZES_FIELD_NUMBER: _ClassVar[int]
    MAX_ABS_ERROR_FIELD_NUMBER: _ClassVar[int]
    MAX_REL_ERROR_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_ERROR_FIELD_NUMBER: _ClassVar[int]
    provider: str
    batch_sizes: _containers.RepeatedScalarFieldContainer[int]
    max_abs_error: float
    max_rel_error: float
    max_batch_error: float
    def __init__(self, provider: _Optional[str] = ..., batch_sizes: _Optional[_Iterable[int]] = ..., max_abs_error: _Optional[float] = ..., max_rel_error: _Optional[float] = ..., max_batch_error: _Optional[float] = ...) -> None: ...
