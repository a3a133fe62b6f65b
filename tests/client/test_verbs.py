"""The verbs of both clients against a real server with a really trained model."""

import numpy as np
import onnxruntime
import pytest

from both_clients import AwaitedClient, both_clients
from serving import running_server
from vaeserve import Client, InvalidArgument, ModelRef

REAL = {"rtol": 1e-4, "atol": 1e-5}  # a row's answer may differ in the last bits with the rows it was run with


@pytest.fixture(scope="module")
def server(models_dir):
    with running_server(models_dir) as running:
        yield running


@pytest.fixture(scope="module", params=[Client, AwaitedClient], ids=["blocking", "asyncio"])
def client(server, request):
    with request.param(server.target) as connected:
        connected.wait_ready(30)
        yield connected


@pytest.fixture(scope="module")
def run_graph(bundle_dir):
    def run(graph, rows):
        session = onnxruntime.InferenceSession(bundle_dir / f"{graph}.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: rows})

    return run


def test_encode_is_the_encoders_answer(client, test_images, run_graph):
    codes = client.encode(test_images)
    mean, stddev = run_graph("encoder", test_images / np.float32(255))
    np.testing.assert_allclose(codes.mean, mean, **REAL)
    np.testing.assert_allclose(codes.stddev, stddev, **REAL)
    assert codes.mean.dtype == codes.stddev.dtype == np.float32
    assert codes.latents is None
    assert codes.seed is None
    assert len(codes) == len(test_images)


def test_every_kind_of_the_same_images_gives_the_same_codes(client, test_images):
    expected = client.encode(test_images[:5]).mean
    for images in (
        test_images[:5, 0],
        test_images[:5] / 255,
        test_images[:5] / np.float32(255),
        list(test_images[:5, 0]),
        np.asfortranarray(test_images[:5]),
        (image for image in test_images[:5]),
    ):
        np.testing.assert_allclose(client.encode(images).mean, expected, **REAL)


def test_results_are_the_callers_own(client, test_images):
    codes = client.encode(test_images[:2])
    codes.mean[:] = 0  # a view of a message could not be written to
    images = client.decode(codes)
    images[:] = 0


def test_decode_is_the_decoders_answer(client, test_images, run_graph):
    codes = client.encode(test_images)
    (expected,) = run_graph("decoder", codes.mean)
    images = client.decode(codes)
    np.testing.assert_allclose(images, expected, **REAL)
    assert images.dtype == np.float32
    np.testing.assert_allclose(client.decode(codes.mean), images, **REAL)
    np.testing.assert_allclose(client.decode(codes.mean[0]), images[:1], **REAL)


@pytest.mark.parametrize("dtype", ["uint8", np.uint8, "float16", np.float32])
def test_images_come_in_the_type_asked_for(client, test_images, dtype):
    codes = client.encode(test_images[:4])
    images, exact = client.decode(codes, dtype=dtype), client.decode(codes)
    assert images.dtype == np.dtype(dtype)
    scale = 255 if images.dtype == np.uint8 else 1
    np.testing.assert_allclose(images / scale, exact, atol=0.002 + 1e-4)
    assert client.sample(3, dtype=dtype).images.dtype == np.dtype(dtype)
    assert client.reconstruct(test_images[:3], dtype=dtype).dtype == np.dtype(dtype)


def test_latents_are_mean_plus_stddev_times_the_seeds_noise(client, test_images):
    from vaeserve_server.noise import standard_normal

    codes = client.encode(test_images[:6], want_latents=True, seed=11, first_row=3)
    noise = standard_normal(11, 3, 6, codes.mean.shape[1])
    np.testing.assert_allclose(codes.latents, codes.mean + codes.stddev * noise, **REAL)
    assert codes.seed == 11


def test_samples_are_decoded_noise_of_the_seed(client, run_graph):
    from vaeserve_server.noise import standard_normal

    samples = client.sample(10, seed=7)
    noise = standard_normal(7, 0, 10, samples.latents.shape[1])
    np.testing.assert_array_equal(samples.latents, noise)
    np.testing.assert_allclose(samples.images, run_graph("decoder", noise)[0], **REAL)
    assert samples.seed == 7
    np.testing.assert_array_equal(client.sample(4, seed=7).latents, samples.latents[:4])
    np.testing.assert_array_equal(client.sample(4, seed=7, first_row=6).latents, samples.latents[6:])


def test_without_a_seed_every_draw_is_another_and_can_be_had_again(client):
    first, second = client.sample(2), client.sample(2)
    assert first.seed != second.seed
    np.testing.assert_array_equal(client.sample(2, seed=first.seed).latents, first.latents)


def test_temperature_scales_the_draws(client):
    np.testing.assert_array_equal(client.sample(3, temperature=0).latents, 0)
    half, whole = client.sample(3, seed=1, temperature=0.5), client.sample(3, seed=1)
    np.testing.assert_array_equal(half.latents, whole.latents / 2)


def test_reconstruct_is_decode_of_encode(client, test_images):
    expected = client.decode(client.encode(test_images))
    np.testing.assert_allclose(client.reconstruct(test_images), expected, **REAL)
    np.testing.assert_allclose(client.reconstruct(iter(test_images)), expected, **REAL)


def test_bulk_equals_one_call(server, client, test_images):
    images = np.concatenate([test_images] * 3)
    with Client(server.target, rows_per_call=50, calls_in_flight=6) as cut:
        one, many = client.encode(images, want_latents=True, seed=3), cut.encode(images, want_latents=True, seed=3)
        np.testing.assert_allclose(many.mean, one.mean, **REAL)
        np.testing.assert_allclose(many.latents, one.latents, **REAL)
        np.testing.assert_allclose(cut.decode(many), client.decode(one), **REAL)


def test_interpolation_of_images_goes_from_one_to_the_other(client, test_images):
    codes = client.encode(test_images[:2])
    path = client.interpolate(test_images[0], test_images[1, 0], 5)
    t = np.linspace(0, 1, 5, dtype=np.float32)[:, None]
    expected = client.decode((1 - t) * codes.mean[0] + t * codes.mean[1])
    assert path.shape == (5, *test_images.shape[1:])
    np.testing.assert_allclose(path, expected, **REAL)
    for a, b in ((codes[0], codes[1]), (codes.mean[0], codes.mean[1:2]), (test_images[0], codes[1])):
        np.testing.assert_allclose(client.interpolate(a, b, 5), expected, **REAL)


def test_spherical_interpolation_keeps_to_the_sphere(client):
    a, b = np.zeros((2, 20), np.float32)
    a[0], b[1] = 4, 4
    path = client.interpolate(a, b, 3, spherical=True)
    middle = np.zeros(20, np.float32)
    middle[:2] = 4 / np.sqrt(2)
    np.testing.assert_allclose(path, client.decode(np.stack([a, middle, b])), **REAL)


def test_traversal_sets_one_element_to_each_value(client, test_images):
    codes = client.encode(test_images[:1])
    images = client.traverse(codes, 3, [-2, 0, 2])
    latents = np.repeat(codes.mean, 3, axis=0)
    latents[:, 3] = [-2, 0, 2]
    np.testing.assert_allclose(images, client.decode(latents), **REAL)
    np.testing.assert_allclose(client.traverse(codes.mean[0], (3,), np.array([-2.0, 0, 2])), images, **REAL)
    np.testing.assert_allclose(client.traverse(codes, -17, [-2, 0, 2]), images, **REAL)


def test_streams_give_what_the_whole_gives(client, test_images):
    codes = list(client.encode_stream(iter(test_images)))
    means = np.concatenate([part.mean for part in codes])
    np.testing.assert_allclose(means, client.encode(test_images).mean, **REAL)
    images = np.concatenate(list(client.decode_stream(iter(codes), dtype="uint8")))
    assert np.abs(images.astype(int) - client.decode(means, dtype="uint8")).max() <= 1


def test_model_says_what_is_served(client, bundle_dir):
    info = client.model()
    assert info == client.models()[0]
    assert (info.name, info.version, info.image_shape, info.latent_shape) == ("mnist", "1", (1, 28, 28), (20,))
    assert info.encoder_input == "binarised"
    assert info.provider == "CPUExecutionProvider"
    assert info.max_rows_per_call >= 1
    assert info.digest in (bundle_dir / "model.json").read_text()
    assert client.model("mnist/1").ref == ModelRef("mnist", "1", info.digest) == info.ref
    assert str(info).startswith("mnist/1\n")
    assert info.digest in str(info)
    assert len(str(info).splitlines()) < 15  # the card alone has hundreds of lines
    assert "\n" not in repr(info)


def test_answers_say_which_model_gave_them(client, test_images):
    ref = client.model().ref
    assert client.encode(test_images[:1]).model == ref
    assert client.sample(1).model == ref
    assert client.encode(test_images[:1], model=ref).model == ref
    assert client.healthy()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda client, images: client.interpolate(images[:2], images[0], 3), "a has 2 rows; give one"),
        (lambda client, images: client.interpolate(images[0], iter(images), 3), "b is a .*; give one image"),
        (
            lambda client, images: client.interpolate(images[0], np.zeros(7), 3),
            r"b has shape \(7,\); model mnist/1 takes",
        ),
        (lambda client, images: client.interpolate(images[0], images[1], 1), "steps is 1; give 2 or more"),
        (lambda client, images: client.traverse(np.zeros(20), 20, [0]), r"dim is 20; a latent has shape \(20,\)"),
        (lambda client, images: client.traverse(np.zeros(20), (1, 1), [0]), r"dim is \(1, 1\); a latent has shape"),
        (lambda client, images: client.traverse(np.zeros(20), 0, []), "values are empty"),
        (lambda client, images: client.traverse(np.zeros((2, 20)), 0, [0]), "latent has 2 rows; give one"),
    ],
)
def test_paths_that_make_no_sense_are_refused(client, test_images, call, words):
    with pytest.raises(InvalidArgument, match=words):
        call(client, test_images)


@both_clients
def test_a_latent_that_could_be_an_image_is_not_guessed_at(connect, tmp_path):
    from bundles import write_bundle

    write_bundle(tmp_path, image_shape=(1, 4, 4), latent_shape=(1, 4, 4))
    with running_server(tmp_path) as running, connect(running.target) as client:
        either = np.zeros((1, 4, 4), np.float32)
        with pytest.raises(InvalidArgument, match=r"could be an image or a latent of mnist/1; give client\.encode"):
            client.interpolate(either, either, 3)
        codes = client.encode(either)
        assert client.interpolate(codes, codes, 3).shape == (3, 1, 4, 4)
