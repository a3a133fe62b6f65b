"""One call, whatever transport brought it: bytes in, bytes out, or one status. Its log line and its place in the drain.

Transports hand over the request's bytes rather than its message, so that bytes which are no message get the same answer
as any other bad input.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2
from vaeserve.v1 import vae_pb2

from vaeserve_server import status
from vaeserve_server.errors import CallError, InvalidInputError
from vaeserve_server.service import VaeService

_log = logging.getLogger(__name__)


class CallFailedError(Exception):
    """The call failed with `status`."""

    def __init__(self, status: status.Status) -> None:
        super().__init__(status.message)
        self.status = status


@dataclass(frozen=True)
class Method:
    """One RPC: its name, how its request is parsed, and what answers it."""

    name: str
    parse: Callable[[bytes], Message]
    answer: Callable[[Any, float], Awaitable[Message]]  # each verb takes its own request type


class Calls:
    """The calls of one service, over all transports."""

    def __init__(self, service: VaeService) -> None:
        self._loop = asyncio.get_running_loop()
        self._in_flight = 0
        self._idle = asyncio.Event()  # kept only once somebody waits for it
        self._awaited = False
        self.methods = [
            Method("Encode", vae_pb2.EncodeRequest.FromString, service.encode),
            Method("Decode", vae_pb2.DecodeRequest.FromString, service.decode),
            Method("Sample", vae_pb2.SampleRequest.FromString, service.sample),
            Method("GetModel", vae_pb2.GetModelRequest.FromString, service.get_model),
            Method("ListModels", vae_pb2.ListModelsRequest.FromString, service.list_models),
        ]

    async def answer(self, method: Method, payload: bytes, remaining_s: float | None) -> bytes:
        """Return the serialised answer; CallFailedError with its status if there is none.

        `remaining_s` is the time until the caller's deadline, None without one. Cancelling takes the call's rows out of
        the queue.
        """
        started = self._loop.time()
        deadline = math.inf if remaining_s is None else started + remaining_s
        self._in_flight += 1
        code = code_pb2.CANCELLED
        try:
            answer = (await method.answer(_parse(method, payload), deadline)).SerializeToString()
        except CallError as error:
            failure = status.of_error(error)
            code = failure.code
            raise CallFailedError(failure) from None
        except Exception:  # noqa: BLE001 - the caller hears nothing of it but the id
            call_id = secrets.token_hex(8)
            _log.exception("call failed", extra={"fields": {"call_id": call_id, "rpc": method.name}})
            code = code_pb2.INTERNAL
            raise CallFailedError(status.of_fault(call_id)) from None
        else:
            code = code_pb2.OK
            return answer
        finally:
            self._in_flight -= 1
            if self._awaited and not self._in_flight:
                self._idle.set()
            if _log.isEnabledFor(logging.DEBUG):
                self._log_call(method, code, len(payload), started)

    async def wait_idle(self) -> None:
        """Wait until no call is in flight; for a drain, when no more come."""
        self._awaited = True
        if self._in_flight:
            await self._idle.wait()

    def _log_call(self, method: Method, code: int, request_bytes: int, started: float) -> None:
        fields = {
            "rpc": method.name,
            "code": code_pb2.Code.Name(code),
            "request_bytes": request_bytes,
            "ms": round((self._loop.time() - started) * 1000, 3),
        }
        _log.debug("call", extra={"fields": fields})


def _parse(method: Method, payload: bytes) -> Message:
    try:
        return method.parse(payload)
    except DecodeError:
        raise InvalidInputError(
            "", f"the request's {len(payload)} bytes are not a {method.name}Request message"
        ) from None
