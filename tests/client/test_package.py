"""The package's face: what `vaeserve` offers, and what importing it costs and needs."""

import subprocess
import sys

import pytest

import vaeserve

HEAVY = ("grpc", "numpy", "onnxruntime", "torch", "PIL", "rich", "pydantic", "vaeserve_server", "vaeserve_training")


def loaded_after(statement):
    """Return the top-level modules that a fresh process has after a statement."""
    script = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_the_public_names_are_these():
    assert sorted(vaeserve.__all__) == [
        "AsyncClient",
        "Cancelled",
        "Client",
        "ClientClosed",
        "DeadlineExceeded",
        "Encoding",
        "FailedPrecondition",
        "FieldViolation",
        "Internal",
        "InvalidArgument",
        "ModelInfo",
        "ModelRef",
        "NotFound",
        "PermissionDenied",
        "ResourceExhausted",
        "Samples",
        "TLS",
        "Unauthenticated",
        "Unavailable",
        "Unimplemented",
        "UnknownError",
        "VaeserveError",
        "__version__",
    ]


def test_every_public_name_is_there_and_listed():
    for name in vaeserve.__all__:
        assert getattr(vaeserve, name) is not None
        assert name in dir(vaeserve)


def test_star_import_gives_exactly_the_public_names():
    namespace = {}
    exec("from vaeserve import *", namespace)
    namespace.pop("__builtins__")
    assert set(namespace) == set(vaeserve.__all__)


def test_every_exception_is_public():
    from vaeserve import errors

    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds - {"DecodeError"} <= set(vaeserve.__all__)


def test_other_names_are_missing_in_the_usual_way():
    with pytest.raises(AttributeError, match="module 'vaeserve' has no attribute 'Cleint'"):
        vaeserve.Cleint  # noqa: B018
    with pytest.raises(ImportError):
        exec("from vaeserve import Cleint")


@pytest.mark.parametrize("statement", ["import vaeserve", "import vaeserve.v1.vae_pb2"])
def test_the_bare_package_and_its_messages_load_nothing_heavy(statement):
    assert not loaded_after(statement) & set(HEAVY)


@pytest.mark.parametrize(
    "statement",
    ["from vaeserve import Client, AsyncClient", "from vaeserve import *", "import vaeserve.cli, vaeserve.tensors"],
)
def test_the_sdk_needs_its_base_dependencies_only(statement):
    assert loaded_after(statement) & set(HEAVY) <= {"grpc", "numpy"}


def test_exceptions_and_settings_can_be_had_without_grpc():
    assert "grpc" not in loaded_after("from vaeserve import NotFound, TLS, ModelRef")


def test_both_clients_have_the_same_verbs_and_arguments():
    import inspect

    def verbs(kind):
        return {
            name: list(inspect.signature(value).parameters.items())
            for name, value in vars(kind).items()
            if not name.startswith("_")
        }

    blocking, awaited = verbs(vaeserve.Client), verbs(vaeserve.AsyncClient)
    assert blocking.keys() == awaited.keys()
    for name in blocking.keys() - {"encode_stream", "decode_stream"}:  # these take asynchronous iterators too
        assert blocking[name] == awaited[name], name
    for name in ("encode_stream", "decode_stream"):
        assert [parameter for parameter, _ in blocking[name]] == [parameter for parameter, _ in awaited[name]]
    assert {"encode", "decode", "sample", "reconstruct", "interpolate", "traverse"} <= blocking.keys()
    assert {"model", "models", "healthy", "wait_ready"} <= blocking.keys()
