"""The wire codec: every array comes back as it was, and every message that is no array is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vaeserve import tensors
from vaeserve.v1 import vae_pb2

DTYPES = st.sampled_from(["<f4", ">f4", "<f2", ">f2", "u1"])
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=6, min_side=0, max_side=4))
)


def through_the_wire(array):
    message = vae_pb2.Tensor.FromString(tensors.to_tensor(array).SerializeToString())
    return tensors.from_tensor(message)


@given(ARRAYS)
def test_round_trip_keeps_values_shape_and_type(array):
    back = through_the_wire(array)
    assert back.dtype == array.dtype.newbyteorder("<")
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)  # NaN equals NaN here, which is what is wanted


@given(ARRAYS, st.randoms(use_true_random=False))
def test_round_trip_of_views_that_are_not_contiguous(array, random):
    axes = random.sample(range(array.ndim), array.ndim)
    view = array.transpose(axes)[tuple(slice(None, None, random.choice([1, -1, 2])) for _ in axes)]
    np.testing.assert_array_equal(through_the_wire(view), view)


def test_the_wire_is_little_endian_and_row_major():
    message = tensors.to_tensor(np.array([[1.0, 2.0]], dtype=">f4").T)
    assert message.data == bytes.fromhex("0000803f00000040")
    assert list(message.shape) == [2, 1]


def test_decoding_does_not_copy_and_does_not_let_anybody_write():
    message = tensors.to_tensor(np.zeros(3, np.float32))
    array = tensors.from_tensor(message)
    assert not array.flags.owndata
    assert not array.flags.writeable


@pytest.mark.parametrize("dtype", ["f8", "i4", "i8", "c8", "?", "O", "U3"])
def test_other_types_have_no_place_on_the_wire(dtype):
    with pytest.raises(TypeError, match="use float32, uint8 or float16"):
        tensors.to_tensor(np.zeros(1, dtype))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("data", vae_pb2.Tensor(dtype=tensors.FLOAT32, shape=[2], data=b"1234567")),
        ("data", vae_pb2.Tensor(dtype=tensors.UINT8, shape=[2, 2], data=b"12345")),
        ("shape", vae_pb2.Tensor(dtype=tensors.UINT8, shape=[2**62, 2**62, 4], data=b"")),
        ("shape", vae_pb2.Tensor(dtype=tensors.UINT8, shape=[-1], data=b"1")),
        ("shape", vae_pb2.Tensor(dtype=tensors.UINT8, shape=[1] * 9, data=b"1")),
        ("shape", vae_pb2.Tensor(dtype=tensors.UINT8, shape=[0, 2**62, 2**62], data=b"")),
        ("dtype", vae_pb2.Tensor(dtype=99, shape=[1], data=b"1")),
        ("dtype", vae_pb2.Tensor(shape=[1], data=b"1")),
    ],
)
def test_a_message_that_is_not_one_array_is_refused_by_field(field, message):
    with pytest.raises(tensors.TensorError) as caught:
        tensors.from_tensor(message)
    assert caught.value.field == field


def test_of_a_masked_array_the_elements_under_the_mask_are_sent() -> None:
    masked = np.ma.masked_array(np.array([7, 8], np.uint8), mask=[False, True])
    assert tensors.to_tensor(masked).data == bytes([7, 8])
