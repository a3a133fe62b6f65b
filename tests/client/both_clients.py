"""One suite for both clients: an adapter that gives AsyncClient the blocking client's shape.

`@both_clients` runs a test twice, with `connect` as Client and as the adapter.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from vaeserve import AsyncClient, Client


class AwaitedClient:
    """AsyncClient, each verb awaited in an event loop of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._client, name)
        if not callable(verb):
            return verb

        def call(*args: Any, **kwargs: Any) -> Any:
            result = verb(*args, **kwargs)
            if inspect.isawaitable(result):
                return self._runner.run(_await(result))
            return self._iterate(result)

        return call

    def _iterate(self, values: AsyncIterator[Any]) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._runner.run(anext_of(values))
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(values.aclose())

    def __enter__(self) -> AwaitedClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


async def _await(result: Any) -> Any:
    return await result


async def anext_of(values: AsyncIterator[Any]) -> Any:
    """Return the next value; a coroutine, as Runner wants one."""
    return await anext(values)


both_clients = pytest.mark.parametrize("connect", [Client, AwaitedClient], ids=["blocking", "asyncio"])
