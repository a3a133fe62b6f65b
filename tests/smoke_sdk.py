"""The SDK with nothing but its base dependencies, whatever their major versions: `make test-protobuf7` runs this.

No pytest here: the environment it runs in has only what `pip install vaeserve` brings.
"""

import concurrent.futures

import google.protobuf
import grpc
import numpy as np

import vaeserve
from vaeserve import tensors
from vaeserve.v1 import vae_pb2, vae_pb2_grpc


class _Echo(vae_pb2_grpc.VaeServiceServicer):
    """Answers Encode with the images' own row means as a one-dimensional code."""

    def GetModel(self, request, context):  # noqa: N802
        card = vae_pb2.ModelCard(name="echo", version="1", digest="0" * 64, image_shape=[1, 2, 2], latent_shape=[1])
        return vae_pb2.GetModelResponse(card=card, serving=vae_pb2.Serving(max_rows_per_call=64))

    def Encode(self, request, context):  # noqa: N802
        images = tensors.from_tensor(request.images)
        mean = images.reshape(len(images), -1).mean(axis=1, dtype=np.float32).reshape(-1, 1)
        ref = vae_pb2.ModelRef(name="echo", version="1", digest="0" * 64)
        return vae_pb2.EncodeResponse(
            model=ref, mean=tensors.to_tensor(mean), stddev=tensors.to_tensor(np.ones_like(mean))
        )


def main() -> None:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    vae_pb2_grpc.add_VaeServiceServicer_to_server(_Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    images = np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2)
    with vaeserve.Client(f"127.0.0.1:{port}") as client:
        mean = client.encode(images).mean
    server.stop(None)
    assert np.array_equal(mean[:, 0], [1.5, 5.5, 9.5]), mean
    print(f"vaeserve {vaeserve.__version__} on protobuf {google.protobuf.__version__}, grpcio {grpc.__version__}: ok")


if __name__ == "__main__":
    main()
