"""Every status is one exception, with everything the server said, in a process or across two."""

import pickle

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

import vaeserve
from both_clients import both_clients
from faulty_server import IMAGE_SHAPE, faulty_server
from vaeserve import errors

IMAGES = np.zeros((1, *IMAGE_SHAPE), np.uint8)
EXPECTED = {
    "CANCELLED": errors.Cancelled,
    "UNKNOWN": errors.UnknownError,
    "INVALID_ARGUMENT": errors.InvalidArgument,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.UnknownError,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "RESOURCE_EXHAUSTED": errors.ResourceExhausted,
    "FAILED_PRECONDITION": errors.FailedPrecondition,
    "ABORTED": errors.UnknownError,
    "OUT_OF_RANGE": errors.UnknownError,
    "UNIMPLEMENTED": errors.Unimplemented,
    "INTERNAL": errors.Internal,
    "UNAVAILABLE": errors.Unavailable,
    "DATA_LOSS": errors.UnknownError,
    "UNAUTHENTICATED": errors.Unauthenticated,
}


@pytest.fixture
def server():
    with faulty_server() as running:
        yield running


def with_details(code, message, *details):
    """Return a fault that ends a call with google.rpc details."""
    rich = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        rich.details.add().Pack(detail)

    def fault(context):
        context.set_trailing_metadata((("grpc-status-details-bin", rich.SerializeToString()),))
        context.abort(code, message)

    return fault


def raised_by(server, connect, fault):
    server.service.faults = [fault]
    with connect(server.target, max_attempts=1) as client, pytest.raises(vaeserve.VaeserveError) as caught:
        client.model()
    return caught.value


def test_the_table_above_has_every_status():
    assert set(EXPECTED) == {code.name for code in grpc.StatusCode} - {"OK"}


@both_clients
@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name != "OK"], ids=lambda code: code.name)
def test_every_status_is_its_own_exception(server, connect, code):
    error = raised_by(server, connect, with_details(code, "what happened"))
    assert type(error) is EXPECTED[code.name]
    assert error.code == code.name
    assert str(error).endswith("what happened")


@both_clients
def test_details_arrive_as_attributes(server, connect):
    violation = error_details_pb2.BadRequest.FieldViolation(field="images", description="too odd")
    error = raised_by(
        server,
        connect,
        with_details(
            grpc.StatusCode.INVALID_ARGUMENT,
            "images are too odd",
            error_details_pb2.BadRequest(field_violations=[violation]),
            error_details_pb2.ErrorInfo(reason="ODD", metadata={"model": "mnist/1", "call_id": "c0ffee"}),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
        ),
    )
    assert error.violations == (errors.FieldViolation("images", "too odd"),)
    assert (error.reason, error.model, error.call_id, error.retry_after_s) == ("ODD", "mnist/1", "c0ffee", 1.5)


@both_clients
def test_damaged_details_do_not_hide_the_error(server, connect):
    def fault(context):
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "no such model")

    error = raised_by(server, connect, fault)
    assert isinstance(error, errors.NotFound)
    assert str(error) == "no such model"


@both_clients
def test_words_about_a_status_of_the_server_are_the_servers(server, connect):
    error = raised_by(server, connect, with_details(grpc.StatusCode.UNAVAILABLE, "the server is loading its models"))
    assert str(error) == "the server is loading its models"


@pytest.mark.parametrize(
    "kind",
    sorted({*EXPECTED.values(), errors.ClientClosed, errors.VaeserveError}, key=lambda kind: kind.__name__),
)
def test_exceptions_survive_pickling(kind):
    error = kind(
        "words", violations=[errors.FieldViolation("a", "b")], model="m/1", call_id="id", retry_after_s=2.0, reason="R"
    )
    error.code = "DATA_LOSS"
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert vars(back) == vars(error)
    assert str(back) == "words"


def test_every_exception_has_one_base_and_the_builtin_that_people_catch():
    for kind in EXPECTED.values():
        assert issubclass(kind, vaeserve.VaeserveError)
    assert issubclass(errors.InvalidArgument, ValueError)
    assert issubclass(errors.DeadlineExceeded, TimeoutError)
    assert issubclass(errors.Unavailable, ConnectionError)
    assert issubclass(errors.NotFound, LookupError)


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = {line.split()[1] for line in errors.__doc__.splitlines() if line.strip().startswith(("├──", "└──"))}
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.VaeserveError) and value is not errors.VaeserveError
    }
    assert drawn == defined


def test_errors_do_not_drag_grpcs_own_along(server):
    server.service.faults = [with_details(grpc.StatusCode.NOT_FOUND, "no")]
    with vaeserve.Client(server.target) as client, pytest.raises(vaeserve.NotFound) as caught:
        client.encode(IMAGES)
    assert caught.value.__suppress_context__
