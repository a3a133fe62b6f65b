"""One process of a soak's load: `blocking` or `asyncio` clients of the SDK. Prints its books as one line of JSON.

python soak_clients.py blocking 127.0.0.1:50051 ARCHIVE small,digits SECONDS SEED
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc

from soak_models import SMALL, Direct
from soak_watch import figures
from soak_wishes import Books, Ledger, Wish, Wishes
from vaeserve import AsyncClient, Client, errors
from vaeserve._settings import ChannelSettings
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc

THREADS, TASKS = 3, 12
_PATIENCE_S = 60.0  # of a call that nobody means to expire
_SHORTEST_S, _LONGEST_S = 0.0005, 0.02
_SHORT, _CANCEL, _BAD = 0.1, 0.1, 0.05  # shares of the calls
_REFUSALS = (errors.InvalidArgument, errors.NotFound, errors.FailedPrecondition)


def judge(ledger: Ledger, books: Books, wish: Wish, answer: Any) -> None:
    """Book an answer."""
    try:
        wish.check(answer)
    except AssertionError as error:
        books.wrong += 1
        ledger.complain(f"{wish.verb} {wish.options}: {error}")
    else:
        books.answered += 1


def book(ledger: Ledger, books: Books, wish: Wish, error: BaseException, *, short: bool, bad: bool) -> None:
    """Book a failure as what it was meant to be, or as a failure."""
    if short and isinstance(error, errors.DeadlineExceeded):
        books.expired += 1
    elif (bad and isinstance(error, _REFUSALS)) or isinstance(error, errors.ResourceExhausted):
        books.refused += 1
    else:
        books.failed += 1
        ledger.complain(f"{wish.verb} {wish.options}: {type(error).__name__}: {error}")


class Blocking:
    """Threads that share a client; raw calls beside it, which alone can be cancelled, and can be malformed."""

    def __init__(self, target: str, direct: Direct, names: list[str], until: float, seed: int) -> None:
        self._target = target
        self._until = until
        self._ledgers = [Ledger() for _ in range(THREADS)]
        self._wishes = [Wishes(direct, names, seed + place) for place in range(THREADS)]

    def run(self) -> dict[str, Any]:
        """Call until the time is over; return the books."""
        options = ChannelSettings(self._target).channel_options()
        with Client(self._target, connections=4) as client, grpc.insecure_channel(self._target, options) as channel:
            stub = vae_pb2_grpc.VaeServiceStub(channel)
            threads = [
                threading.Thread(target=self._live, args=(place, client, stub), daemon=True) for place in range(THREADS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(max(0.0, self._until - time.monotonic()) + 2 * _PATIENCE_S)
        return merged(self._ledgers)

    def _live(self, place: int, client: Client, stub: Any) -> None:
        ledger, wishes = self._ledgers[place], self._wishes[place]
        while time.monotonic() < self._until:
            dice = wishes.random.random()
            if dice < _CANCEL:
                self._cancel(ledger, wishes, stub)
            elif dice < _CANCEL + _BAD:
                self._malformed(ledger, wishes, stub)
            else:
                self._call(ledger, wishes, client, short=dice > 1 - _SHORT)

    def _call(self, ledger: Ledger, wishes: Wishes, client: Client, *, short: bool) -> None:
        wish = wishes.next()
        timeout_s = wishes.random.uniform(_SHORTEST_S, _LONGEST_S) if short else _PATIENCE_S
        books = ledger.open(wish.verb)
        try:
            answer = getattr(client, wish.verb)(*wish.arguments, **wish.options, timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001 - booked
            book(ledger, books, wish, error, short=short, bad=False)
        else:
            judge(ledger, books, wish, answer)

    def _cancel(self, ledger: Ledger, wishes: Wishes, stub: Any) -> None:
        books = ledger.open("sample")
        request = pb.SampleRequest(model=pb.ModelRef(name=SMALL), count=wishes.random.randint(1, 64), seed=1)
        call = stub.Sample.future(request, timeout=_PATIENCE_S)
        time.sleep(wishes.random.uniform(0, _LONGEST_S / 4))
        call.cancel()
        code = call.code()
        if code == grpc.StatusCode.CANCELLED:
            books.cancelled += 1
        elif code == grpc.StatusCode.OK and call.result().images.shape[0] == request.count:
            books.answered += 1
        elif code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            books.refused += 1
        else:
            books.failed += 1
            ledger.complain(f"a call that was cancelled: {code} {call.details()}")

    def _malformed(self, ledger: Ledger, wishes: Wishes, stub: Any) -> None:
        books = ledger.open("bad input")
        model = pb.ModelRef(name=SMALL)
        tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[2**40, 1, 1, 1], data=b"\0" * 8)
        send, request, code = wishes.random.choice(
            [
                (stub.Encode, pb.EncodeRequest(model=model, images=tensor), "INVALID_ARGUMENT"),
                (stub.Encode, pb.EncodeRequest(model=model), "INVALID_ARGUMENT"),
                (stub.Sample, pb.SampleRequest(model=model, count=0), "INVALID_ARGUMENT"),
                (stub.Sample, pb.SampleRequest(model=model, count=2**31 - 1), "INVALID_ARGUMENT"),
                (stub.Sample, pb.SampleRequest(model=pb.ModelRef(name="\0"), count=1), "NOT_FOUND"),
                (
                    stub.Decode,
                    pb.DecodeRequest(model=pb.ModelRef(name=SMALL, digest="f" * 64), latents=tensor),
                    "FAILED_PRECONDITION",
                ),
            ]
        )
        call = send.future(request, timeout=_PATIENCE_S)
        if call.code().name == code:
            books.refused += 1
        else:
            books.failed += 1
            ledger.complain(f"bad input, expected {code}: {call.code()} {call.details()}")


class Asyncio:
    """Tasks that share a client, half of them coalesced."""

    def __init__(self, target: str, direct: Direct, names: list[str], until: float, seed: int) -> None:
        self._target = target
        self._until = until
        self._ledger = Ledger()
        self._wishes = Wishes(direct, names, seed)

    def run(self) -> dict[str, Any]:
        """Call until the time is over; return the books."""
        return asyncio.run(self._run())

    async def _run(self) -> dict[str, Any]:
        before = len(asyncio.all_tasks())
        async with (
            AsyncClient(self._target, connections=3) as plain,
            AsyncClient(self._target, coalesce=True) as coalescing,
        ):
            live = [self._live(plain if place % 2 else coalescing) for place in range(TASKS)]
            limit_s = max(0.0, self._until - time.monotonic()) + 2 * _PATIENCE_S
            await asyncio.wait_for(asyncio.gather(*live), limit_s)
        await asyncio.sleep(0)
        return merged([self._ledger]) | {"tasks": len(asyncio.all_tasks()) - before}

    async def _live(self, client: AsyncClient) -> None:
        wishes = self._wishes
        while time.monotonic() < self._until:
            dice = wishes.random.random()
            bad, short, cancel = dice < _BAD, dice > 1 - _SHORT, 0.5 < dice < 0.5 + _CANCEL
            wish = wishes.bad() if bad else wishes.next()
            timeout_s = wishes.random.uniform(_SHORTEST_S, _LONGEST_S) if short else _PATIENCE_S
            books = self._ledger.open("bad input" if bad else wish.verb)
            call = getattr(client, wish.verb)(*wish.arguments, **wish.options, timeout_s=timeout_s)
            try:
                if cancel:
                    answer = await self._cancelled(call)
                else:
                    answer = await call
            except asyncio.CancelledError:
                books.cancelled += 1
            except Exception as error:  # noqa: BLE001 - booked
                book(self._ledger, books, wish, error, short=short, bad=bad)
            else:
                judge(self._ledger, books, wish, answer)

    async def _cancelled(self, call: Any) -> Any:
        task = asyncio.ensure_future(call)
        await asyncio.sleep(self._wishes.random.uniform(0, _LONGEST_S))
        task.cancel()
        return await task


def merged(ledgers: list[Ledger]) -> dict[str, Any]:
    """Return several ledgers as one."""
    one = Ledger()
    for ledger in ledgers:
        for verb, books in ledger.books.items():
            into = one.books.setdefault(verb, Books())
            for name, value in vars(books).items():
                setattr(into, name, getattr(into, name) + value)
        one.problems += ledger.problems
    return one.as_json()


def main(kind: str, text: str) -> None:
    """Call as the plan (JSON) says, and print the books."""
    plan = json.loads(text)
    until = time.monotonic() + plan["seconds"]
    clients = {"blocking": Blocking, "asyncio": Asyncio}[kind]
    books = clients(plan["target"], Direct(Path(plan["archive"])), plan["names"], until, plan["seed"]).run()
    print(json.dumps(books | {"figures": figures("self")._asdict()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
