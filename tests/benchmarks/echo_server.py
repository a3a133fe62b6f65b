"""A bare grpcio asyncio server: takes the same requests as ours and gives back recorded answers, computing nothing.

What a front end of grpcio costs at least. No protobuf, no checks; the bytes on the wire are the same.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

_Handler = Callable[[bytes, Any], Awaitable[bytes]]


async def main() -> None:
    """Read the answers by method, in base64, from one line of standard input; print the port; serve until killed."""
    answers = {method: base64.b64decode(answer) for method, answer in json.loads(sys.stdin.readline()).items()}
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handlers = {method: grpc.unary_unary_rpc_method_handler(_replay(answer)) for method, answer in answers.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("vaeserve.v1.VaeService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"port": port}), flush=True)
    await server.wait_for_termination()


def _replay(answer: bytes) -> _Handler:
    async def handle(request: bytes, context: Any) -> bytes:
        return answer

    return handle


if __name__ == "__main__":
    asyncio.run(main())
