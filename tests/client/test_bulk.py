"""Bulk work: cut into calls, several in flight, answers in order, one model, bounded memory."""

import threading

import numpy as np
import pytest
from grpc import StatusCode

from both_clients import AwaitedClient, both_clients
from faulty_server import DIGESTS, IMAGE_SHAPE, LATENT, FaultyService, faulty_server, refuse
from vaeserve import Client, Encoding, FailedPrecondition, InvalidArgument, ModelRef, NotFound


def numbered_images(count):
    """Images whose first pixels tell their row, float32 in 0..1."""
    images = np.zeros((count, *IMAGE_SHAPE), np.float32)
    images[:, 0, 0, 0] = np.arange(count) / 2**14
    return images


@pytest.fixture
def server():
    with faulty_server() as running:
        yield running


@both_clients
@pytest.mark.parametrize("rows", [1, 6, 7, 8, 50])
def test_rows_come_back_in_order_however_they_are_cut(server, connect, rows):
    images = numbered_images(rows)
    with connect(server.target, rows_per_call=7) as client:
        codes = client.encode(images)
        back = client.decode(codes)
    np.testing.assert_array_equal(codes.mean[:, 0], images[:, 0, 0, 0])
    np.testing.assert_array_equal(back, images)
    assert sum(call.rows for call in server.service.calls("Encode")) == rows
    assert max(call.rows for call in server.service.calls("Encode")) <= 7


@both_clients
def test_calls_are_as_equal_as_can_be(server, connect):
    with connect(server.target, rows_per_call=10) as client:
        client.encode(numbered_images(31))
    assert sorted(call.rows for call in server.service.calls("Encode")) == [7, 8, 8, 8]


@both_clients
def test_the_servers_row_limit_holds_whatever_the_client_wants(connect):
    service = FaultyService(max_rows_per_call=5)
    with faulty_server(service) as server, connect(server.target, rows_per_call=100) as client:
        client.encode(numbered_images(15))
        client.sample(15)
    assert [call.rows for call in service.asked if call.rows] == [5] * 6


@both_clients
def test_a_call_is_never_larger_than_a_message_may_be(server, connect):
    with connect(server.target, max_message_bytes=2**16, rows_per_call=10**6) as client:
        assert len(client.encode(numbered_images(2000))) == 2000
    assert len(server.service.calls("Encode")) > 1


@both_clients
def test_as_many_calls_are_in_flight_as_asked_for_and_no_more(server, connect):
    everybody_is_here = threading.Barrier(3)

    def wait_for_others(asked):
        if asked.method == "Encode":
            everybody_is_here.wait(timeout=20)

    server.service.hook = wait_for_others
    with connect(server.target, rows_per_call=2, calls_in_flight=3) as client:
        client.encode(numbered_images(12))  # 6 calls: the barrier lets them pass in threes or not at all
    assert server.service.most_at_once == 3


@both_clients
def test_an_iterator_is_read_no_faster_than_its_answers_are_taken(server, connect):
    read = 0

    def images():
        nonlocal read
        for image in numbered_images(1000):
            read += 1
            yield image

    with connect(server.target, rows_per_call=10, calls_in_flight=2) as client:
        stream = client.encode_stream(images())
        taken = 0
        for _ in range(20):
            taken += len(next(stream))
            # Two calls in flight, each of ten rows, besides what has been handed out.
            assert read <= taken + 2 * 10
        stream.close()
    assert taken == 200


@both_clients
def test_items_of_an_iterator_may_be_images_or_arrays_of_any_length(server, connect):
    images = numbered_images(40)
    pieces = [images[0], images[1:2], images[2:25], images[25:25], list(images[25:30]), images[30:]]
    with connect(server.target, rows_per_call=8) as client:
        codes = list(client.encode_stream(iter(pieces)))
        assert [len(part) for part in codes] == [8, 8, 8, 8, 8]
        whole = client.encode(iter(pieces))
    np.testing.assert_array_equal(Encoding.join(codes).mean, whole.mean)
    np.testing.assert_array_equal(whole.mean[:, 0], images[:, 0, 0, 0])


@both_clients
def test_a_stream_of_two_types_keeps_both_and_their_order(server, connect):
    grey = np.full((3, *IMAGE_SHAPE), 255, np.uint8)
    with connect(server.target, rows_per_call=8) as client:
        parts = list(client.encode_stream(iter([numbered_images(2), grey, numbered_images(1)])))
    assert [len(part) for part in parts] == [2, 3, 1]
    assert (parts[1].mean == 1).all()


@both_clients
def test_what_encode_stream_gives_decode_stream_takes(server, connect):
    images = numbered_images(30)
    with connect(server.target, rows_per_call=7) as client:
        codes = list(client.encode_stream(iter(images)))
        server.service.version = "2"  # the server's newest: the codes still go to the model they came from
        back = np.concatenate(list(client.decode_stream(iter(codes))))
    np.testing.assert_array_equal(back, images)
    assert {call.digest for call in server.service.calls("Decode")} == {DIGESTS["1"]}


def test_the_asyncio_client_takes_an_asynchronous_iterator(server):
    images = numbered_images(20)

    async def arriving():
        for image in images:
            yield image

    with AwaitedClient(server.target, rows_per_call=6) as client:
        streamed = Encoding.join(list(client.encode_stream(arriving())))
        whole = client.encode(arriving())
    np.testing.assert_array_equal(streamed.mean[:, 0], images[:, 0, 0, 0])
    np.testing.assert_array_equal(whole.mean, streamed.mean)


@both_clients
def test_a_model_that_changes_in_the_middle_never_shows_in_one_result(server, connect):
    def reload_after_three(asked):
        if len(server.service.calls("Encode")) == 3:
            server.service.version = "2"

    server.service.hook = reload_after_three
    with connect(server.target, rows_per_call=2) as client:
        codes = client.encode(numbered_images(40))
    assert len(set(codes.stddev.ravel())) == 1  # the fake model writes its version there
    assert codes.model in {ModelRef("fake", "1", DIGESTS["1"]), ModelRef("fake", "2", DIGESTS["2"])}
    np.testing.assert_array_equal(codes.mean, numbered_images(40)[:, 0, 0, :LATENT])


@both_clients
def test_later_calls_name_the_model_of_the_first_answer(server, connect):
    with connect(server.target, rows_per_call=1, calls_in_flight=1) as client:
        client.encode(numbered_images(4))
    assert [call.digest for call in server.service.calls("Encode")] == ["", *[DIGESTS["1"]] * 3]


@both_clients
def test_a_bulk_call_fails_rather_than_go_on_with_another_model(server, connect):
    def replace_model(asked):
        if len(server.service.calls("Encode")) == 3:
            server.service.version, server.service.served = "2", ["2"]

    server.service.hook = replace_model
    with (
        connect(server.target, rows_per_call=1, calls_in_flight=1) as client,
        pytest.raises((NotFound, FailedPrecondition)),
    ):
        client.encode(numbered_images(8))


@both_clients
def test_latents_go_only_to_the_model_they_came_from(server, connect):
    with connect(server.target) as client:
        codes = client.encode(numbered_images(3))
        server.service.version, server.service.served = "2", ["2"]
        with pytest.raises((NotFound, FailedPrecondition)):
            client.decode(codes)
        with pytest.raises(FailedPrecondition, match="digest of another model"):
            client.decode(codes, model="fake/2")
        assert len(client.decode(codes.mean)) == 3  # bare arrays have no owner


@both_clients
def test_latents_of_two_models_do_not_go_together(server, connect):
    with connect(server.target) as client:
        first, second = (client.encode(numbered_images(1), model=f"fake/{version}") for version in "12")
        with pytest.raises(FailedPrecondition, match=r"latents of fake/2 .* do not go with model fake/1"):
            client.decode([first, second])
        with pytest.raises(FailedPrecondition, match=r"latents of fake/2 .* do not go with model fake/1"):
            list(client.decode_stream(iter([first, second])))


@both_clients
def test_a_cut_call_equals_one_call_seed_and_all(server, connect):
    images = numbered_images(23)
    with connect(server.target) as whole, connect(server.target, rows_per_call=4) as cut:
        one, many = whole.encode(images, want_latents=True, seed=9), cut.encode(images, want_latents=True, seed=9)
        np.testing.assert_array_equal(one.latents, many.latents)
        np.testing.assert_array_equal(
            whole.sample(23, seed=9, first_row=5).latents, cut.sample(23, seed=9, first_row=5).latents
        )
    assert one.seed == many.seed == 9


@both_clients
def test_one_seed_is_drawn_for_all_calls_and_small_enough_for_every_language(server, connect):
    with connect(server.target, rows_per_call=4) as client:
        codes, samples = client.encode(numbered_images(9), want_latents=True), client.sample(9)
    assert {call.seed for call in server.service.calls("Encode")} == {codes.seed}
    assert {call.seed for call in server.service.calls("Sample")} == {samples.seed}
    assert 0 <= codes.seed < 2**53
    assert codes.seed != samples.seed


@both_clients
def test_a_bad_row_is_named_by_its_place_in_the_whole(server, connect):
    def complain_about_the_third_part(context):
        context.abort(StatusCode.INVALID_ARGUMENT, "images row 2 has the value nan; every value must be finite")

    server.service.hook = lambda asked: None
    passes = [lambda context: None] * 3  # GetModel and two calls
    server.service.faults = [*passes, complain_about_the_third_part]
    with (
        connect(server.target, rows_per_call=5, calls_in_flight=1) as client,
        pytest.raises(InvalidArgument, match=r"^images row 12 has the value nan"),
    ):
        client.encode(numbered_images(20))


@both_clients
def test_a_failed_call_ends_the_bulk_call_and_what_is_still_in_flight(server, connect):
    server.service.faults = [lambda context: None, refuse(StatusCode.PERMISSION_DENIED, "not for you")]
    with connect(server.target, rows_per_call=1, calls_in_flight=2) as client:
        with pytest.raises(Exception, match="not for you"):
            client.encode(numbered_images(100))
        assert len(server.service.calls("Encode")) < 10
        assert len(client.encode(numbered_images(3))) == 3  # the client lives on


@both_clients
def test_progress_is_told_in_rows(server, connect):
    told = []
    with connect(server.target, rows_per_call=4) as client:
        client.encode(numbered_images(10), progress=lambda done, total: told.append((done, total)))
        assert told == [(3, 10), (6, 10), (10, 10)]
        told.clear()
        list(client.encode_stream(iter(numbered_images(6)), progress=lambda done, total: told.append((done, total))))
        assert told == [(4, None), (6, None)]


def test_progress_is_silent_where_there_is_no_terminal(server, capfd):
    with Client(server.target, rows_per_call=2) as client:
        client.encode(numbered_images(6), progress=True)
    assert capfd.readouterr() == ("", "")


def test_several_threads_share_a_client(server):
    images = numbered_images(64)
    failures = []

    def work(client, row):
        for _ in range(20):
            codes = client.encode(images[row : row + 8])
            if not np.array_equal(codes.mean[:, 0], images[row : row + 8, 0, 0, 0]):
                failures.append(row)

    with Client(server.target, rows_per_call=3) as client:
        threads = [threading.Thread(target=work, args=(client, row)) for row in range(0, 64, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert len(server.service.calls("Encode")) == 8 * 20 * 3


@both_clients
def test_a_new_model_of_another_shape_is_noticed(connect):
    service = FaultyService()
    with faulty_server(service) as server, connect(server.target) as client:
        client.encode(numbered_images(1))
        service.image_shape, service.version = (1, 2, 3), "2"
        assert client.encode(np.zeros((1, 2, 3), np.uint8)).model.version == "2"
