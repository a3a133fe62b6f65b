"""Tokens on both transports: what is let in, in which words the rest is refused, and files that change."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from metrics_page import scrape
from serving import running_server
from vaeserve_server import renewal, token_command, tokens
from vaeserve_server.errors import TokensError
from vaeserve_server.tokens import Token, TokenFile, Tokens

SERVICE = "vaeserve.v1.VaeService"
GET_MODEL, LIST_MODELS, SAMPLE = f"/{SERVICE}/GetModel", f"/{SERVICE}/ListModels", f"/{SERVICE}/Sample"
REFUSED = "no valid token came with the call; send `authorization: Bearer TOKEN`"
_LIMIT_S = 30.0


class Book:
    """A file of tokens, and the secrets that a test needs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tokens: dict[str, Token] = {}

    def add(self, name: str, *rpcs: str, expires: datetime | None = None) -> str:
        secret, self._tokens[name] = tokens.make(name, rpcs, expires)
        self.write()
        return secret

    def remove(self, name: str) -> None:
        del self._tokens[name]
        self.write()

    def write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(TokenFile(tokens=tuple(self._tokens.values())).model_dump_json(exclude_none=True))
        new.replace(self.path)


@pytest.fixture(scope="module", params=["grpc", "envoy"])
def transport(request: pytest.FixtureRequest) -> str:
    if request.param == "envoy":
        pytest.importorskip("pyvoy")
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def _look_often() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renewal, "POLL_S", 0.05)
        yield


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    return Book(tmp_path_factory.mktemp("tokens") / "tokens.json")


@pytest.fixture(scope="module")
def secrets(book: Book) -> dict[str, str]:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    return {
        "reader": book.add("reader", "GetModel", "grpc.reflection.v1alpha.ServerReflection/*"),
        "everything": book.add("everything", "*"),
        "full": book.add("full", f"{SERVICE}/GetModel"),
        "over": book.add("over", "*", expires=yesterday),
    }


@pytest.fixture(scope="module")
def server(several_models: Path, transport: str, book: Book, secrets: dict[str, str]) -> Iterator[Any]:
    with running_server(several_models, transport=transport, tokens=book.path) as running:
        yield running


@pytest.fixture
def channel(server: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as opened:
        yield opened


def call(channel: grpc.Channel, method: str, *authorization: str) -> tuple[str, str]:
    """Call with an empty message; return the code's name and the words."""
    metadata = [("authorization", value) for value in authorization]
    try:
        channel.unary_unary(method)(b"", metadata=metadata, timeout=_LIMIT_S)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(0.02)


def test_a_valid_token_is_let_in(channel: grpc.Channel, secrets: dict[str, str]) -> None:
    for _ in range(2):  # found by its hash, then by what is remembered
        assert call(channel, LIST_MODELS, f"Bearer {secrets['everything']}") == ("OK", "")
    assert call(channel, LIST_MODELS, f"bearer  {secrets['everything']} ") == ("OK", "")


def test_whatever_is_no_valid_token_is_refused_in_the_same_words(
    channel: grpc.Channel, secrets: dict[str, str]
) -> None:
    good = secrets["everything"]
    wrong = {
        "none": (),
        "empty": ("",),
        "no scheme": (good,),
        "another scheme": (f"Basic {good}",),
        "cut": (f"Bearer {good[:-1]}",),
        "longer": (f"Bearer {good}x",),
        "other case": (f"Bearer {good.swapcase()}",),
        "expired": (f"Bearer {secrets['over']}",),
        "two": (f"Bearer {good}", f"Bearer {good}"),
        "two in one": (f"Bearer {good},Bearer {good}",),
        "very long": ("Bearer " + "x" * 7000,),
        "its name": ("Bearer everything",),
    }
    for name, authorization in wrong.items():
        for method in (LIST_MODELS, "/no.such.Service/Method"):
            assert call(channel, method, *authorization) == ("UNAUTHENTICATED", REFUSED), name


def test_a_token_is_for_its_rpcs_and_no_other(channel: grpc.Channel, secrets: dict[str, str]) -> None:
    for name in ("reader", "full"):
        bearer = f"Bearer {secrets[name]}"
        assert call(channel, GET_MODEL, bearer)[0] == "INVALID_ARGUMENT"  # let in: several models, none named
        denied = ("PERMISSION_DENIED", f"the token {name} is not for '{SERVICE}/Sample'")
        assert call(channel, SAMPLE, bearer) == denied
        assert call(channel, f"/{SERVICE}/getmodel", bearer)[0] == "PERMISSION_DENIED"
        assert call(channel, "/other.Service/GetModel", bearer)[0] == "PERMISSION_DENIED"
        assert call(channel, "/inference.GRPCInferenceService/ModelInfer", bearer)[0] == "PERMISSION_DENIED"
    everything = f"Bearer {secrets['everything']}"
    assert call(channel, "/no.such.Service/Method", everything)[0] == "UNIMPLEMENTED"


def test_a_refusal_has_an_id_and_a_reason_and_is_counted(
    server: Any, channel: grpc.Channel, secrets: dict[str, str]
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(SAMPLE)(b"", metadata=[("authorization", f"Bearer {secrets['reader']}")])
    trailers = dict(raised.value.trailing_metadata())
    assert re.fullmatch(r"[0-9a-f]{16}", trailers["vaeserve-call-id"])
    rich = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(info)
    assert info.reason == "RPC_NOT_ALLOWED"


def test_a_large_message_is_refused_before_it_is_read(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as raised:  # else RESOURCE_EXHAUSTED: it is larger than the server takes
        channel.unary_unary(SAMPLE)(bytes(40 * 2**20), timeout=_LIMIT_S)
    assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_health_is_open_and_reflection_is_not(channel: grpc.Channel, secrets: dict[str, str]) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.RpcError) as raised:
        next(reflect(iter([request])))
    assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
    answer = next(reflect(iter([request]), metadata=[("authorization", f"Bearer {secrets['reader']}")]))
    assert SERVICE in {service.name for service in answer.list_services_response.service}


def test_a_changed_file_is_taken_over_and_a_broken_one_is_not(
    server: Any, channel: grpc.Channel, book: Book, secrets: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    def log() -> str:
        return server.log() if hasattr(server, "log") else caplog.text

    old = book.add("old", "*")
    until(lambda: call(channel, LIST_MODELS, f"Bearer {old}")[0] == "OK")
    good = book.path.read_text()
    book.path.write_text(good[:-2])
    until(lambda: f"the file of tokens changed and cannot be used, keeping the old: --tokens {book.path}" in log())
    assert call(channel, LIST_MODELS, f"Bearer {old}")[0] == "OK"
    book.path.unlink()
    until(lambda: "it cannot be read: No such file or directory" in log())
    assert call(channel, LIST_MODELS, f"Bearer {old}")[0] == "OK"
    book.remove("old")
    until(lambda: call(channel, LIST_MODELS, f"Bearer {old}") == ("UNAUTHENTICATED", REFUSED))
    assert call(channel, LIST_MODELS, f"Bearer {secrets['everything']}")[0] == "OK"


def test_health_is_closed_where_that_is_wanted(
    several_models: Path, transport: str, book: Book, secrets: dict[str, str]
) -> None:
    settings = {"transport": transport, "tokens": book.path, "open_health": False}
    with running_server(several_models, **settings) as server, grpc.insecure_channel(server.target) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        with pytest.raises(grpc.RpcError) as raised:
            check(health_pb2.HealthCheckRequest())
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        check(health_pb2.HealthCheckRequest(), metadata=[("authorization", f"Bearer {secrets['everything']}")])


def test_refusals_are_in_the_metrics(server: Any, channel: grpc.Channel, secrets: dict[str, str]) -> None:
    before = scrape(server)
    for _ in range(3):
        call(channel, SAMPLE)
    call(channel, SAMPLE, f"Bearer {secrets['reader']}")
    after = scrape(server)
    for code, count in {"UNAUTHENTICATED": 3, "PERMISSION_DENIED": 1}.items():
        labels = {"rpc": "Sample", "code": code}
        assert after("vaeserve_calls_total", **labels) - before("vaeserve_calls_total", **labels) == count


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it: invalid JSON"),
        ("[]", "it: input should be an object"),
        ('{"tokens": 3}', "tokens: input should be a valid array"),
        ('{"schema_version": 2}', "schema_version: input should be 1"),
        ('{"tokens": [{"name": "x", "hash": "SECRET", "rpcs": ["*"]}]}', "tokens[0].hash: a hash is as `vaeserve-s"),
        ('{"tokens": [{"SECRET": 1}]}', "tokens[0].?: extra inputs are not permitted"),
        ('{"SECRET": "SECRET"}', "?: extra inputs are not permitted"),
        ('{"tokens": [{"name": "S E", "hash": "", "rpcs": []}]}', "tokens[0].name: a name is 1 to 64 letters"),
        ('{"tokens": [{"expires": "SECRET"}]}', "tokens[0].expires: input should be a valid datetime"),
    ],
)
def test_a_file_that_is_none_is_told_without_what_stands_in_it(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(TokensError) as raised:
        tokens.read(path)
    assert words in str(raised.value)
    assert "SECRET" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_names_and_rpcs_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    book = Book(tmp_path / "tokens.json")
    book.add("a", "*")
    twice = json.loads(book.path.read_text())
    twice["tokens"] *= 2
    book.path.write_text(json.dumps(twice))
    with pytest.raises(TokensError, match="two tokens have the name a"):
        tokens.read(book.path)
    for rpc in ("Encod", "encode", "**", "Encode*", "/a.B/C", "a.B/C/D", "", "a.B/", "*/Encode"):
        with pytest.raises(ValueError, match="rpcs"):
            tokens.make("a", (rpc,), None)
    for rpc in ("Encode", "*", "a.B/C", "a.B/*", f"{SERVICE}/Encode"):
        tokens.make("a", (rpc,), None)


def test_a_short_name_means_this_service_alone() -> None:
    _, token = tokens.make("a", ("Encode",), None)
    assert token.allows(f"{SERVICE}/Encode")
    assert not token.allows("other.Service/Encode")
    assert not token.allows("Encode")
    assert not token.allows("")


def test_one_secret_has_many_hashes_and_none_holds_it() -> None:
    secret, token = tokens.make("a", ("*",), None)
    other, other_token = tokens.make("a", ("*",), None)
    assert secret != other
    assert token.hash.split("$")[1] != other_token.hash.split("$")[1]
    assert token.is_of(secret.encode())
    assert not token.is_of(other.encode())
    assert secret.removeprefix(tokens.PREFIX) not in token.model_dump_json()


def test_what_is_remembered_is_bounded_by_the_file_and_forgotten_with_it(tmp_path: Path) -> None:
    book = Book(tmp_path / "tokens.json")
    secret = book.add("a", "*")
    known = Tokens(book.path)
    known.use(tokens.read(book.path))
    for number in range(1000):
        assert known.find(f"{secret}{number}") is None
    assert known.find(secret) is known.find(secret) is known.tokens[0]
    assert len(known._found) == 1
    assert secret.encode() not in b"".join(known._found)
    known.use(TokenFile())
    assert known.find(secret) is None


def test_a_token_expires_although_it_was_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Book(tmp_path / "tokens.json")
    secret = book.add("a", "*", expires=datetime.now(UTC) + timedelta(hours=1))
    known = Tokens(book.path)
    known.use(tokens.read(book.path))
    assert known.find(secret) is not None

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Later:
            return cls.fromtimestamp(datetime.now(UTC).timestamp() + 3601, UTC)

    monkeypatch.setattr(tokens, "datetime", Later)
    assert known.find(secret) is None


def run_command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = token_command.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_makes_lists_and_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens.json"
    add = ("add", "batch", "--rpc", "Encode", "--rpc", "Decode", "--days", "30", "-o", str(file))
    status, secret, told = run_command(*add, capsys=capsys)
    assert (status, secret.count("\n")) == (0, 1)
    assert "batch, for Encode, Decode, GetModel, until " in told
    assert secret.strip() not in told
    assert secret.strip() not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (token,) = tokens.read(file).tokens
    assert token.is_of(secret.strip().encode())
    assert token.expires is not None

    status, out, told = run_command(*add, capsys=capsys)
    assert (status, out) == (1, "")
    assert "has a token batch already; remove it first" in told

    file.chmod(0o640)
    exactly = ("add", "one", "--rpc", "Encode", "--only", "-o", str(file))
    assert run_command(*exactly, capsys=capsys)[0] == 0
    assert [token.rpcs for token in tokens.read(file).tokens] == [("Encode", "Decode", "GetModel"), ("Encode",)]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640

    _, listed, _ = run_command("list", "-o", str(file), capsys=capsys)
    assert re.fullmatch(r"batch  Encode, Decode, GetModel  expires .* UTC\none  Encode  expires never\n", listed)
    assert run_command("remove", "batch", "-o", str(file), capsys=capsys) == (0, "", "")
    assert run_command("remove", "batch", "-o", str(file), capsys=capsys)[0] == 1
    assert [token.name for token in tokens.read(file).tokens] == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.json"]


def test_the_command_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens.json"
    status, out, told = run_command("add", "a b", "--rpc", "Encod", "-o", str(file), capsys=capsys)
    assert (status, out) == (2, "")
    assert "a name is 1 to 64 letters" in told
    assert "an RPC is one of Encode, Decode, " in told
    assert not file.exists()
    file.write_text("not JSON")
    status, out, told = run_command("add", "a", "--rpc", "Encode", "-o", str(file), capsys=capsys)
    assert (status, out) == (1, "")
    assert told.startswith(f"vaeserve-server token: {file}: it: invalid JSON")
    assert file.read_text() == "not JSON"
    nowhere = str(tmp_path / "no" / "tokens.json")
    assert "its folder cannot be opened" in run_command("add", "a", "--rpc", "*", "-o", nowhere, capsys=capsys)[2]


def test_tokens_made_at_once_are_all_kept(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    names = [f"caller-{number}" for number in range(12)]
    threads = [
        threading.Thread(target=token_command.main, args=(["add", name, "--rpc", "*", "-o", str(file)],))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(token.name for token in tokens.read(file).tokens) == sorted(names)


def test_the_command_is_one_of_the_servers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vaeserve_server", "token", "add", "a", "--rpc", "Encode"]
    done = subprocess.run(
        [*command, "-o", "tokens.json"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith(tokens.PREFIX)
