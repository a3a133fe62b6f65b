"""Calls of many tasks that travel as one: fewer calls, and nothing else that a task could notice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bundles import DECODER, ENCODER, brittle_encoder, run_directly, write_bundle
from faulty_server import IMAGE_SHAPE, LATENT, Asked, FaultyServer, faulty_server, refuse
from serving import RunningServer, running_server
from vaeserve import (
    AsyncClient,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ModelRef,
    ResourceExhausted,
    Unavailable,
    VaeserveError,
)

SHAPE, CODE = (1, 4, 4), (3,)
Scenario = Callable[[AsyncClient], Awaitable[None]]


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty_server() as running:
        yield running


@pytest.fixture(scope="module")
def brittle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose encoder breaks on a pixel of 1, and whose decoder on a latent of 1e30."""
    folder = tmp_path_factory.mktemp("brittle")
    graphs = {ENCODER: brittle_encoder(SHAPE, CODE)}
    return write_bundle(folder, image_shape=SHAPE, latent_shape=CODE, graphs=graphs).parent.parent


@pytest.fixture(scope="module")
def brittle(brittle_dir: Path) -> Iterator[RunningServer]:
    with running_server(brittle_dir) as running:
        yield running


def with_client(target: str, scenario: Scenario, **options: object) -> None:
    """Run `scenario` with a coalescing client that has its model's card; nothing of it may stay behind."""

    async def live() -> None:
        complaints: list[dict[str, object]] = []

        def note(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
            # grpcio has one poller for all loops of a process; tests whose loops are gone make it complain.
            if "PollerCompletionQueue" not in str(context["message"]):
                complaints.append(context)

        asyncio.get_running_loop().set_exception_handler(note)
        async with AsyncClient(target, coalesce=True, **options) as client:  # type: ignore[arg-type]
            await client.model()
            await asyncio.wait_for(scenario(client), 60)
            await until(lambda: client._coalescer is not None and not client._coalescer._groups)
        assert not complaints

    asyncio.run(live())


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop go on until `condition` holds; the test's own time limit bounds it."""
    while not condition():  # noqa: ASYNC110 - there is no event for all that a test may ask
        await asyncio.sleep(0)


async def until_asked(server: FaultyServer, calls: int) -> None:
    await until(lambda: len(server.service.calls("Encode")) == calls)


def numbered(rows: int, first: int = 0) -> np.ndarray:
    """Images whose first pixel tells their row."""
    images = np.zeros((rows, *IMAGE_SHAPE), np.float32)
    images[:, 0, 0, 0] = (first + np.arange(rows)) / 2**14
    return images


def test_calls_of_one_turn_are_one_and_each_task_gets_its_own_rows(server: FaultyServer) -> None:
    sizes = [1, 1, 5, 2, 1, 30]

    async def scenario(client: AsyncClient) -> None:
        given_images = [numbered(rows, 100 * i) for i, rows in enumerate(sizes)]
        codes = await asyncio.gather(*map(client.encode, given_images))
        for images, each in zip(given_images, codes, strict=True):
            assert np.array_equal(each.mean[:, 0], images[:, 0, 0, 0])
            assert each.mean.base is None  # an array of its own, not a piece of everybody's
            assert each.latents is None
        assert [call.rows for call in server.service.calls("Encode")] == [sum(sizes)]
        images = await asyncio.gather(*map(client.decode, codes))
        for back, code in zip(images, codes, strict=True):
            assert np.array_equal(back.reshape(len(back), -1)[:, :LATENT], code.mean)
        assert [call.rows for call in server.service.calls("Decode")] == [sum(sizes)]

    with_client(server.target, scenario)


def test_without_coalescing_they_are_as_many_as_there_are_tasks(server: FaultyServer) -> None:
    async def live() -> None:
        async with AsyncClient(server.target) as client:
            await asyncio.gather(*(client.encode(numbered(1)) for _ in range(6)))

    asyncio.run(live())
    assert len(server.service.calls("Encode")) == 6


def test_what_comes_while_calls_are_under_way_goes_with_the_next(server: FaultyServer) -> None:
    release, _ = hold(server)

    async def scenario(client: AsyncClient) -> None:
        tasks = []
        for i in range(6):
            tasks.append(asyncio.create_task(client.encode(numbered(1, i))))
            await until_asked(server, min(i + 1, 2))
        release.set()
        codes = await asyncio.gather(*tasks)
        assert [code.mean[0, 0] * 2**14 for code in codes] == list(range(6))
        assert [call.rows for call in server.service.calls("Encode")] == [1, 1, 4]

    with_client(server.target, scenario)


def test_a_call_carries_no_more_rows_than_it_may(server: FaultyServer) -> None:
    async def scenario(client: AsyncClient) -> None:
        codes = await asyncio.gather(*(client.encode(numbered(3, 3 * i)) for i in range(10)))
        assert np.array_equal(np.concatenate([code.mean for code in codes])[:, 0] * 2**14, np.arange(30))
        assert max(call.rows for call in server.service.calls("Encode")) <= 10
        assert len(server.service.calls("Encode")) == 4

    with_client(server.target, scenario, rows_per_call=10)


def test_only_calls_that_are_alike_travel_together(server: FaultyServer) -> None:
    async def scenario(client: AsyncClient) -> None:
        float_images, latents = numbered(1), np.zeros((1, LATENT), np.float32)
        for _ in range(2):  # the cards of models named otherwise are asked for once
            server.service.asked.clear()
            await asyncio.gather(
                *(client.encode(float_images) for _ in range(2)),
                *(client.encode(np.zeros((1, *IMAGE_SHAPE), np.uint8)) for _ in range(2)),
                *(client.encode(float_images, model="fake/2") for _ in range(2)),
                *(client.decode(latents) for _ in range(2)),
                *(client.decode(latents, dtype=np.uint8) for _ in range(2)),
            )
        assert sorted(call.method for call in server.service.asked) == ["Decode"] * 2 + ["Encode"] * 3
        assert [call.rows for call in server.service.asked] == [2] * 5

    with_client(server.target, scenario)


def test_what_draws_noise_goes_alone_and_keeps_its_seed(server: FaultyServer) -> None:
    async def scenario(client: AsyncClient) -> None:
        codes = await asyncio.gather(
            *(client.encode(numbered(2), want_latents=True, seed=7, first_row=10 * i) for i in range(3))
        )
        samples = await asyncio.gather(*(client.sample(2, seed=i) for i in range(3)))
        assert [code.latents[:, 1].tolist() for code in codes if code.latents is not None] == [
            [0, 1],
            [10, 11],
            [20, 21],
        ]
        assert [each.seed for each in samples] == [0, 1, 2]
        assert [call.rows for call in server.service.asked if call.rows] == [2] * 6

    with_client(server.target, scenario)


def test_no_rows_are_refused_as_ever(brittle: RunningServer) -> None:
    async def scenario(client: AsyncClient) -> None:
        with pytest.raises(InvalidArgument, match="images have 0 rows"):
            await client.encode(np.zeros((0, *SHAPE), np.float32))

    with_client(brittle.target, scenario)


def test_a_bad_call_fails_only_itself_in_words_about_its_own_rows(brittle: RunningServer) -> None:
    latents = [np.zeros((2, *CODE), np.float32) for _ in range(5)]
    latents[3][1] = 1e30

    async def scenario(client: AsyncClient) -> None:
        results = await asyncio.gather(*map(client.decode, latents), return_exceptions=True)
        assert isinstance(results[3], InvalidArgument)
        assert results[3].message.startswith("row 1 has a latent as large as 1e+30")
        assert [getattr(result, "shape", None) for i, result in enumerate(results) if i != 3] == [(2, *SHAPE)] * 4

    with_client(brittle.target, scenario)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (refuse(grpc.StatusCode.UNAVAILABLE), Unavailable),
        (refuse(grpc.StatusCode.FAILED_PRECONDITION), FailedPrecondition),
        (refuse(grpc.StatusCode.DEADLINE_EXCEEDED), DeadlineExceeded),
    ],
)
def test_a_failure_that_is_everybodys_is_told_to_everybody_and_not_tried_again(
    server: FaultyServer, fault: Callable[[grpc.ServicerContext], None], kind: type[VaeserveError]
) -> None:
    async def scenario(client: AsyncClient) -> None:
        server.service.faults = [fault]
        errors = await asyncio.gather(*(client.encode(numbered(1)) for _ in range(5)), return_exceptions=True)
        assert [type(error) for error in errors] == [kind] * 5
        assert len({id(error) for error in errors}) == 5  # each task may add to its own
        assert len(server.service.calls("Encode")) == 1

    with_client(server.target, scenario, max_attempts=1)


def test_rows_too_many_for_a_servers_queue_go_one_by_one(brittle_dir: Path) -> None:
    async def scenario(client: AsyncClient) -> None:
        codes = await asyncio.gather(*(client.encode(np.zeros((2, *SHAPE), np.uint8)) for _ in range(3)))
        assert [len(code) for code in codes] == [2] * 3
        with pytest.raises(ResourceExhausted, match="the queue holds 5"):
            await client.encode(np.zeros((6, *SHAPE), np.uint8))

    # Six rows at once are more than the queue ever holds; two and two are not, and a third pair may have to come back.
    with running_server(brittle_dir, max_queue_rows=5) as small:
        with_client(small.target, scenario)


@pytest.mark.parametrize("lost", [("mean", "stddev"), ("stddev",)])
def test_an_answer_of_another_length_is_never_dealt_out(lost: tuple[str, ...], server: FaultyServer) -> None:
    encode = server.service.Encode

    def lose_a_row(request, context):  # type: ignore[no-untyped-def]
        answer = encode(request, context)
        if request.images.shape[0] > 1:
            for tensor in (getattr(answer, name) for name in lost):
                tensor.data = tensor.data[: -(len(tensor.data) // tensor.shape[0])]
                tensor.shape[0] -= 1
        return answer

    server.service.Encode = lose_a_row

    async def scenario(client: AsyncClient) -> None:
        codes = await asyncio.gather(*(client.encode(numbered(1, i)) for i in range(3)))
        assert [code.mean[0, 0] * 2**14 for code in codes] == [0, 1, 2]
        assert [code.stddev.shape for code in codes] == [(1, LATENT)] * 3

    with_client(server.target, scenario)


def hold(server: FaultyServer) -> tuple[threading.Event, Callable[[], bool]]:
    """Hold Encode calls back until the event is set; the function tells whether one has arrived."""
    release = threading.Event()

    def wait(asked: Asked) -> None:
        if asked.method == "Encode":
            assert release.wait(20)

    server.service.hook = wait
    return release, lambda: bool(server.service.calls("Encode"))


def test_each_task_keeps_its_own_deadline(server: FaultyServer) -> None:
    release, arrived = hold(server)

    async def scenario(client: AsyncClient) -> None:
        patient = [asyncio.create_task(client.encode(numbered(1, i))) for i in range(2)]
        hasty = asyncio.create_task(client.encode(numbered(1), timeout_s=0.05))
        await until(arrived)
        with pytest.raises(DeadlineExceeded, match=r"no answer from .* within 0\.05 s; give the call more time"):
            await hasty
        release.set()
        assert [code.mean[0, 0] * 2**14 for code in await asyncio.gather(*patient)] == [0, 1]
        assert [call.rows for call in server.service.calls("Encode")] == [3]

    with_client(server.target, scenario)


def test_a_cancelled_task_leaves_the_others_alone(server: FaultyServer) -> None:
    release, arrived = hold(server)

    async def scenario(client: AsyncClient) -> None:
        tasks = [asyncio.create_task(client.encode(numbered(1, i))) for i in range(3)]
        await until(arrived)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        release.set()
        assert [code.mean[0, 0] * 2**14 for code in await asyncio.gather(*tasks[1:])] == [1, 2]

    with_client(server.target, scenario)


def test_a_call_that_nobody_waits_for_is_cancelled(server: FaultyServer) -> None:
    ended = threading.Event()
    arrived = threading.Event()

    def stay(context: grpc.ServicerContext) -> None:
        context.add_callback(ended.set)
        arrived.set()
        assert ended.wait(20)

    async def scenario(client: AsyncClient) -> None:
        server.service.faults = [stay]
        tasks = [asyncio.create_task(client.encode(numbered(1))) for _ in range(3)]
        await until(arrived.is_set)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await asyncio.to_thread(ended.wait, 20)

    with_client(server.target, scenario)


def test_closing_ends_what_is_under_way_and_what_waits(server: FaultyServer) -> None:
    release, _ = hold(server)

    async def scenario(client: AsyncClient) -> None:
        tasks = []
        for i in range(4):
            tasks.append(asyncio.create_task(client.encode(numbered(1, i))))
            await until_asked(server, min(i + 1, 2))
        assert client._coalescer is not None
        (group,) = client._coalescer._groups.values()
        await until(lambda: len(group.waiting) == 2)
        await client.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [Cancelled] * 4
        release.set()

    with_client(server.target, scenario)


def test_a_pinned_model_is_kept_apart_from_the_served_one(server: FaultyServer) -> None:
    async def scenario(client: AsyncClient) -> None:
        wrong = ModelRef("fake", "1", "2" * 64)
        results = await asyncio.gather(
            client.encode(numbered(1)), client.encode(numbered(1), model=wrong), return_exceptions=True
        )
        assert isinstance(results[1], FailedPrecondition)
        assert not isinstance(results[0], BaseException)

    with_client(server.target, scenario)


FATES = st.sampled_from(["wait", "wait", "wait", "cancel", "expire", "poison"])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    calls=st.lists(st.tuples(st.integers(1, 20), FATES, st.booleans()), min_size=1, max_size=40),
    rows_per_call=st.sampled_from([20, 33, 256]),
    connections=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_else_goes_on_each_task_gets_its_own(
    brittle: RunningServer,
    brittle_dir: Path,
    *,
    calls: list[tuple[int, str, bool]],
    rows_per_call: int,
    connections: int,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    folder = brittle_dir / "mnist" / "1"

    def rows_of(count: int, fate: str, encodes: bool) -> np.ndarray:
        shape = (count, *(SHAPE if encodes else CODE))
        rows = random.uniform(0, 0.9, shape).astype(np.float32)
        if fate == "poison":
            rows[random.integers(count)] = 1.0 if encodes else 1e30
        return rows

    async def ask(client: AsyncClient, rows: np.ndarray, fate: str, encodes: bool) -> np.ndarray:
        timeout_s = random.uniform(1e-4, 0.01) if fate == "expire" else 60
        if encodes:
            return (await client.encode(rows, timeout_s=timeout_s)).stddev
        return await client.decode(rows, timeout_s=timeout_s)

    async def scenario(client: AsyncClient) -> None:
        given_rows = [rows_of(*call) for call in calls]
        tasks = []
        for rows, (_, fate, encodes) in zip(given_rows, calls, strict=True):
            tasks.append(asyncio.create_task(ask(client, rows, fate, encodes)))
            if fate == "cancel":
                asyncio.get_running_loop().call_later(random.uniform(0, 0.005), tasks[-1].cancel)
            if random.random() < 0.3:
                await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        excused = {"cancel": asyncio.CancelledError, "expire": DeadlineExceeded}
        for rows, (_, fate, encodes), result in zip(given_rows, calls, results, strict=True):
            if fate == "poison":
                assert isinstance(result, Internal if encodes else InvalidArgument)
            elif not isinstance(result, excused.get(fate, ())):
                direct = run_directly(folder, ENCODER if encodes else DECODER, rows)[-1]
                assert isinstance(result, np.ndarray), result
                np.testing.assert_allclose(result, direct, rtol=1e-5, atol=1e-6)

    with_client(brittle.target, scenario, rows_per_call=rows_per_call, connections=connections)
