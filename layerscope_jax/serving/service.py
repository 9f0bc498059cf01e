"""The service: admits requests, has the engine generate for them, and sends the answers."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from layerscope_jax.engine import Engine
from layerscope_jax.generation.chat import Chat
from layerscope_jax.serving.activity import Work
from layerscope_jax.serving.bodies import Asked, Reader
from layerscope_jax.serving.chunks import DONE, Answer, failure_of, is_aborted
from layerscope_jax.serving.incoming import Incoming, Message, Send, check_head
from layerscope_jax.serving.jobs import Job
from layerscope_jax.serving.metrics import Metrics
from layerscope_jax.serving.refusals import JSON, Refusal
from layerscope_jax.serving.settings import ServerConfig
from layerscope_jax.serving.stepper import News, Stepper, Ticket
from layerscope_jax.support.exits import is_deliberate

logger = logging.getLogger(__name__)

STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would keep tokens back
]
READERS = 2
"""Threads that read bodies. Tokenising releases Python's lock, so a long prompt does not delay a step."""


class Service:
    """Answers requests; its methods are called on one event loop, which never waits for the engine.

    Args:
        engine: generates.
        chat: makes prompts of conversations.
        config: limits of what is admitted.

    Attributes:
        metrics: counts.
        draining: whether the server says that it ends.
        refusing: whether it also refuses new requests.
        asked_s: when it was last asked for its health, by `time.monotonic`.
    """

    def __init__(self, engine: Engine, chat: Chat, config: ServerConfig):
        self._engine, self._config = engine, config
        self._most = engine.config.max_num_seqs + config.max_waiting
        self._reader = Reader(
            engine.model,
            config.served_model_name,
            chat,
            engine.defaults,
            config.max_model_len,
            self._most,
            engine.structures,
        )
        self._jobs: set[Job] = set()
        self._taken = 0  # samples that were admitted and have not ended
        self._threads = ThreadPoolExecutor(READERS, "layerscope-bodies")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stepper = Stepper(engine, self._publish)
        self.metrics = Metrics(
            config.served_model_name,
            self._requests,
            engine.config.max_num_seqs,
            lambda: self._stepper.tally.totals,
            engine.config.prefix_cache,
        )
        self.draining = self.refusing = False
        self.asked_s = -math.inf

    # ---- any thread's side -------------------------------------------------------------------------------

    @property
    def is_healthy(self) -> bool:
        """Whether a balancer should send requests here."""
        return self._stepper.is_alive and not self.draining

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return not self._taken

    def load(self) -> dict[str, Any]:
        """Returns how busy the server is, and how many experts are on the device, as an object for JSON.

        A balancer may send requests to the server with most places free.
        """
        running, waiting = self._requests()
        totals, model = self._stepper.tally.totals, self._engine.model
        return {
            "requests_running": running,
            "requests_waiting": waiting,
            "requests_free": self._most - self._taken,
            "experts": model.config.num_moe_layers * model.config.num_experts,
            "experts_resident": self._engine.runner.resident_experts,
            "hit_rate": totals.expert_hits / totals.experts if totals.experts else None,
        }

    def work(self) -> Work:
        """Returns what the server is doing, and what it has done so far."""
        totals = self._stepper.tally.totals
        return Work(*self._requests(), self.metrics.new_tokens, totals.experts, totals.expert_hits)

    def close(self, timeout: float) -> None:
        """Aborts all requests, and ends the service's threads."""
        self.draining = self.refusing = True
        self._stepper.close(timeout)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _publish(self, news: list[News], now: float) -> None:
        """Hands the news of a step to the event loop."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, news, now)
        except RuntimeError:  # the loop has ended, and with it whoever would read them
            logger.debug("news of a step came after the end of the event loop")

    # ---- the event loop's side ---------------------------------------------------------------------------

    def _deliver(self, news: list[News], now: float) -> None:
        for each in news:
            each.ticket.job.receive(each.ticket.index, each.tokens, each.error, now)

    def _requests(self) -> tuple[int, int]:
        """Returns how many samples run, and how many wait."""
        jobs = list(self._jobs)
        return sum([job.running for job in jobs]), sum([job.waiting for job in jobs])

    async def complete(self, url: str, headers: dict[bytes, bytes], incoming: Incoming, send: Send) -> None:
        """Answers a request for a chat or a text.

        Args:
            url: `CHAT_URL` or `TEXT_URL`.
            headers: of the request, by name in lower case.
            incoming: its body.
            send: ASGI's `send`.

        Raises:
            Refusal: if it is not answered; nothing was sent then.
        """
        self._loop = asyncio.get_running_loop()
        came = time.perf_counter()
        if self.refusing:
            raise Refusal(503, "the server is shutting down", headers={"retry-after": "5"})
        check_head(headers, self._config.max_body_bytes)
        async with self._places(1):
            asked = await self._read(await incoming.read(self._config.max_body_bytes), url)
            async with self._places(asked.samples - 1):
                await self._generate(Job(asked, came, self.metrics), incoming, send)

    @asynccontextmanager
    async def _places(self, count: int) -> AsyncIterator[None]:
        """Holds places for samples within the block.

        Raises:
            Refusal: if there are not that many.
        """
        if self._taken + count > self._most:
            raise Refusal(
                429,
                f"{self._most} samples run or wait already; try again later",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count

    async def _read(self, body: bytes, url: str) -> Asked:
        """Returns what a body asks for; read in a thread, because long prompts take a while."""
        assert self._loop is not None
        try:
            return await self._loop.run_in_executor(self._threads, self._reader.read, body, url)
        except ValueError as error:
            if not is_deliberate(error):
                raise
            raise Refusal(400, str(error)) from None
        except RecursionError:
            raise Refusal(400, "the body is nested too deeply") from None

    async def _generate(self, job: Job, incoming: Incoming, send: Send) -> None:
        """Has the engine generate for a job, and sends its answer; a client that leaves ends it."""
        self._jobs.add(job)
        watch = asyncio.create_task(watch_for_leaving(job, incoming))
        try:
            for index, request in enumerate(job.asked.requests):
                handle = self._engine.submit(request)
                job.handles.append(handle)
                self._stepper.add(Ticket(handle, job, index))
            answer = Answer(
                job.asked,
                ("chatcmpl-" if job.asked.chat else "cmpl-") + secrets.token_hex(12),
                self._config.served_model_name,
                int(time.time()),
                self._engine.model.tokenizer,
            )
            await (self._stream if job.asked.stream else self._whole)(job, answer, send)
        finally:
            watch.cancel()
            job.cancel()
            self._jobs.discard(job)

    async def _whole(self, job: Job, answer: Answer, send: Send) -> None:
        """Sends a whole answer at its end."""
        events: list = []
        while not job.over:
            events += await job.news()
        events += await job.news()
        if job.left:
            return
        check_outcome(job, events)
        assert self._loop is not None
        body = await self._loop.run_in_executor(
            self._threads, answer.whole, events, job.new_tokens, job.cached_tokens
        )
        await send(head_of(200, [JSON, (b"content-length", str(len(body)).encode())]))
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, job: Job, answer: Answer, send: Send) -> None:
        """Sends tokens as they come; the first go with the head, so that a failure before has its status."""
        news = await job.news()
        check_outcome(job, news)
        await send(head_of(200, STREAM))
        while news and not job.left:
            if (why := failure_of(news)) is not None:
                await send(part_of(event_of(Refusal(500, why))))
            elif data := answer.events(news):
                await send(part_of(data))
            news = await job.news()
        if job.error is not None:
            await send(part_of(event_of(failed(job.error))))
        end = answer.usage(job.new_tokens, job.cached_tokens) + DONE
        await send({"type": "http.response.body", "body": end})


async def watch_for_leaving(job: Job, incoming: Incoming) -> None:
    """Waits until the client has gone, and ends its job then."""
    await incoming.until_gone()
    job.leave()


def failed(error: BaseException) -> Refusal:
    """Returns the refusal for a request whose step failed."""
    return Refusal(500, f"the engine failed: {type(error).__name__}: {str(error)[:300]}")


def check_outcome(job: Job, events: list) -> None:
    """Raises what a job has failed with before anything was sent.

    Raises:
        Refusal: if a step failed, a sample ended with an error, or the server has aborted the request.
    """
    if job.error is not None:
        raise failed(job.error)
    if (why := failure_of(events)) is not None:
        raise Refusal(500, why)
    if is_aborted(events) and not job.left:
        raise Refusal(503, "the server is shutting down", headers={"retry-after": "5"})


def head_of(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    """Returns ASGI's message that begins an answer."""
    return {"type": "http.response.start", "status": status, "headers": headers}


def part_of(data: bytes) -> Message:
    """Returns ASGI's message of a part of an answer, which more parts follow."""
    return {"type": "http.response.body", "body": data, "more_body": True}


def event_of(refusal: Refusal) -> bytes:
    """Returns the server-sent event of an error in a stream that has begun."""
    return b"data: " + refusal.body() + b"\n\n"
