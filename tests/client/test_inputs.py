"""What users have becomes rows, if it can be meant in one way only; if not, the words say what was given and wanted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from vaeserve import Encoding, InvalidArgument, ModelInfo, ModelRef
from vaeserve._inputs import as_images, as_latents, is_stream
from vaeserve.v1 import vae_pb2


def model(image_shape, latent_shape=(20,)):
    card = vae_pb2.ModelCard(name="m", version="1", digest="d", image_shape=image_shape, latent_shape=latent_shape)
    return ModelInfo.from_message(vae_pb2.GetModelResponse(card=card))


GREY, COLOUR = model((1, 28, 20)), model((3, 28, 20))
RANDOM = np.random.default_rng(0)


def pixels(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "axes", "rows"),
    [
        ((5, 1, 28, 20), None, 5),
        ((1, 28, 20), None, 1),
        ((5, 28, 20), None, 5),
        ((28, 20), None, 1),
        ((5, 28, 20, 1), (0, 3, 1, 2), 5),
        ((28, 20, 1), (2, 0, 1), 1),
        ((0, 1, 28, 20), None, 0),
        ((0, 28, 20), None, 0),
    ],
)
def test_grey_images_of_every_clear_shape(shape, axes, rows):
    given_images = pixels(*shape)
    contract = (given_images if axes is None else given_images.transpose(axes)).reshape(rows, 1, 28, 20)
    fitted = as_images(given_images, GREY)
    np.testing.assert_array_equal(fitted, contract)
    assert fitted.dtype == np.uint8


@pytest.mark.parametrize(
    ("shape", "axes", "rows"),
    [
        ((5, 3, 28, 20), None, 5),
        ((3, 28, 20), None, 1),
        ((5, 28, 20, 3), (0, 3, 1, 2), 5),
        ((28, 20, 3), (2, 0, 1), 1),
    ],
)
def test_colour_images_of_every_clear_shape(shape, axes, rows):
    given_images = pixels(*shape)
    contract = (given_images if axes is None else given_images.transpose(axes)).reshape(rows, 3, 28, 20)
    np.testing.assert_array_equal(as_images(given_images, COLOUR), contract)


def test_where_both_orders_fit_the_contracts_is_meant():
    cube = model((3, 3, 3))
    images = pixels(2, 3, 3, 3)
    np.testing.assert_array_equal(as_images(images, cube), images)


@pytest.mark.parametrize(
    ("shape", "info", "words"),
    [
        ((3, 32, 32), GREY, "images have shape (3, 32, 32) in all; model m/1 takes (N, 1, 28, 20), N rows of shape"),
        ((5, 3, 32, 32), GREY, "images have shape (3, 32, 32); model m/1 takes (1, 28, 20)"),
        ((5, 20, 28), GREY, "images have shape (5, 20, 28) in all"),
        ((5, 28, 20), COLOUR, "images have shape (5, 28, 20) in all"),
        ((28, 20), COLOUR, "images have shape (28, 20) in all"),
        ((560,), GREY, "images have shape (560,) in all"),
        ((), GREY, "images have shape () in all"),
        ((1, 5, 1, 28, 20), GREY, "images have shape (1, 5, 1, 28, 20) in all"),
    ],
)
def test_other_shapes_are_refused_with_given_and_wanted(shape, info, words):
    with pytest.raises(InvalidArgument) as caught:
        as_images(pixels(*shape), info)
    assert str(caught.value).startswith(words)
    assert [violation.field for violation in caught.value.violations] == ["images"]
    assert caught.value.model == "m/1"


@pytest.mark.parametrize(
    ("dtype", "wire"),
    [("u1", "u1"), ("f4", "f4"), ("f2", "f2"), ("f8", "f4"), (">f4", ">f4"), (">f8", "f4"), ("?", "u1")],
)
def test_types_are_kept_where_the_wire_has_them(dtype, wire):
    images = as_images(np.ones((2, 28, 20), dtype), GREY)
    assert images.dtype == np.dtype(wire)
    assert images.max() == (255 if dtype == "?" else 1)  # a binarised image is 0 and 255


@pytest.mark.parametrize("dtype", ["i4", "i8", "u2", "c8", "U1"])
def test_types_whose_range_could_be_anything_are_refused(dtype):
    with pytest.raises(InvalidArgument, match="takes uint8 or float32 or float16"):
        as_images(np.zeros((2, 28, 20), dtype), GREY)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("info", [GREY, COLOUR], ids=["grey", "colour"])
def test_pil_images_of_every_mode_mean_their_colours(mode, info):
    base = Image.fromarray(pixels(28, 20, 3)).convert(mode)
    expected = np.asarray(base.convert("L" if info is GREY else "RGB"))
    fitted = as_images(base, info)
    np.testing.assert_array_equal(fitted[0], expected[None] if info is GREY else expected.transpose(2, 0, 1))
    np.testing.assert_array_equal(as_images([base, base], info), np.concatenate([fitted, fitted]))


def test_pil_images_are_known_by_what_they_can_do():
    array = pixels(28, 20)

    class Picture:
        mode = "L"
        __array_interface__ = array.__array_interface__

        def convert(self, mode):
            raise AssertionError("it is grey already")

        def getbands(self):
            return ("L",)

    np.testing.assert_array_equal(as_images(Picture(), GREY)[0, 0], array)


def test_lists_may_mix_shapes_but_not_types():
    one, more = pixels(28, 20), pixels(3, 1, 28, 20)
    np.testing.assert_array_equal(as_images([one, more], GREY), np.concatenate([one[None, None], more]))
    with pytest.raises(InvalidArgument, match="images mix float32 and uint8; give rows of one dtype"):
        as_images([one, more.astype(np.float32)], GREY)


def test_nested_lists_are_arrays_too():
    latents = [[float(row + column) for column in range(20)] for row in range(3)]
    np.testing.assert_array_equal(as_latents(latents, GREY), np.float32(latents))


@pytest.mark.parametrize("nonsense", [None, 3, "photo.png", b"bytes", object()])
def test_what_is_no_image_at_all_is_named_by_its_type(nonsense):
    with pytest.raises(InvalidArgument, match=f"images are a {type(nonsense).__name__}; give arrays, PIL images"):
        as_images(nonsense, GREY)


def test_rows_of_different_lengths_are_no_array():
    with pytest.raises(InvalidArgument, match="do not form one array of numbers"):
        as_latents([[1.0, 2.0], [3.0]], GREY)


@pytest.mark.parametrize(
    ("dtype", "wire"), [("f4", "f4"), ("f2", "f2"), ("f8", "f4"), ("i8", "f4"), ("u1", "f4"), ("?", "f4")]
)
def test_latents_of_every_real_type(dtype, wire):
    rows = np.ones((3, 20), dtype)
    fitted = as_latents(rows, GREY)
    assert fitted.dtype == np.dtype(wire)
    np.testing.assert_array_equal(fitted, rows)


def test_one_latent_is_a_row_and_spatial_latents_keep_their_axes():
    assert as_latents(np.zeros(20), GREY).shape == (1, 20)
    spatial = model((3, 32, 32), (4, 8, 8))
    assert as_latents(np.zeros((4, 8, 8)), spatial).shape == (1, 4, 8, 8)
    assert as_latents(np.zeros((2, 4, 8, 8)), spatial).shape == (2, 4, 8, 8)


def test_an_encoding_is_its_means():
    mean = np.arange(40, dtype=np.float32).reshape(2, 20)
    codes = Encoding(mean=mean, stddev=np.ones_like(mean), model=ModelRef("m", "1", "d"))
    np.testing.assert_array_equal(as_latents(codes, GREY), mean)
    np.testing.assert_array_equal(as_latents([codes[1], codes[0], mean[0]], GREY), mean[[1, 0, 0]])


def test_what_float32_cannot_hold_is_left_for_the_server_to_name():
    assert np.isinf(as_latents(np.full((1, 20), 1e300), GREY)).all()


@given(hnp.arrays(st.sampled_from(["u1", "f4", "f8"]), st.tuples(st.integers(0, 3), st.just(4), st.just(3))))
def test_values_are_never_changed(images):
    fitted = as_images(images, model((1, 4, 3)))
    assert fitted.shape == (len(images), 1, 4, 3)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(fitted[:, 0], images.astype(fitted.dtype))


@pytest.mark.parametrize(
    ("given_value", "stream"),
    [
        (iter([]), True),
        ((x for x in ()), True),
        ({1: 2}, True),
        ([], False),
        ((), False),
        (np.zeros(3), False),
        ("abc", False),
        (Image.new("L", (2, 2)), False),
    ],
)
def test_streams_are_told_from_rows_at_hand(given_value, stream):
    assert is_stream(given_value) is stream


def test_encodings_are_cut_by_row_number_slice_mask_and_list():
    mean = np.arange(12, dtype=np.float32).reshape(4, 3)
    codes = Encoding(mean=mean, stddev=mean + 1, latents=mean + 2, seed=5, model=ModelRef("m", "1", "d"))
    assert len(codes) == 4
    for index, rows in ((1, [1]), (-1, [3]), (slice(1, 3), [1, 2]), ([2, 0], [2, 0]), (mean[:, 0] > 4, [2, 3])):
        part = codes[index]
        np.testing.assert_array_equal(part.mean, mean[rows])
        np.testing.assert_array_equal(part.stddev, mean[rows] + 1)
        np.testing.assert_array_equal(part.latents, mean[rows] + 2)
        assert part.model == codes.model
    with pytest.raises(IndexError, match="row 4 of an Encoding with 4 rows"):
        codes[4]
    assert [part.mean[0, 0] for part in codes] == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("text", "ref"),
    [("mnist", ModelRef("mnist")), ("mnist/3", ModelRef("mnist", "3")), (None, ModelRef())],
)
def test_models_are_named_in_short(text, ref):
    assert ModelRef.of(text) == ref
    assert ModelRef.of(ref) is ref


def test_a_model_is_not_named_by_a_number():
    with pytest.raises(InvalidArgument, match="model is 3; give"):
        ModelRef.of(3)
