"""Load on an OpenAI-compatible server: many streams at a time from one asyncio loop, each of them checked.

A pool of requests is drawn from a seed (``draw``). Every request has a prompt of random tokens of its own and a fixed
number of tokens to generate, so that it is known when a stream is whole. Three kinds, by turns: greedy; sampled with a
seed; and *marked*: a logit bias allows only tokens that are this request's own, so that one token of another stream is
seen whatever the arithmetic did. Tokens of the others are compared with a reference (``judge``).

Only loopback addresses are accepted. No model, no engine: aiohttp, and msgspec to read the events.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp
import msgspec

OWN_TOKENS = 4  # of a marked request
BIAS = 100.0
NGRAM = 8  # so many tokens of another's reference in a row are no chance


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    id: str = ""
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_event = msgspec.json.Decoder(_Event)


@dataclass(frozen=True)
class Work:
    """A request of the pool. ``own``: the only tokens that may come, of a marked one."""

    number: int
    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    own: frozenset[int] = frozenset()

    def body(self, model: str, verified: bool) -> dict[str, Any]:
        """For ``/v1/completions``; token ids come back if it is to be ``verified``."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if verified:
            body["return_token_ids"] = True
        if self.own:
            body["logit_bias"] = {str(token): BIAS for token in sorted(self.own)}
        return body


def draw(
    count: int,
    *,
    vocab: int,
    prompt_tokens: tuple[int, int],
    new_tokens: tuple[int, int],
    seed: int,
    first_token: int = 100,
    greedy: bool = False,
) -> list[Work]:
    """``count`` requests; lengths are log-uniform between their bounds: many short ones, some long ones.

    ``greedy``: all of them are of the first kind.
    """
    generator = random.Random(seed)

    def length(low: int, high: int) -> int:
        return min(high, int(math.exp(generator.uniform(math.log(low), math.log(high + 1)))))

    free = list(range(first_token, vocab))
    works = []
    left: list[int] = []
    for number in range(count):
        own: frozenset[int] = frozenset()
        if number % 3 == 2 and not greedy:
            if len(left) < OWN_TOKENS:
                left = generator.sample(free, len(free))
            own = frozenset(left.pop() for _ in range(OWN_TOKENS))
        works.append(
            Work(
                number=number,
                prompt=[generator.choice(free) for _ in range(length(*prompt_tokens))],
                max_tokens=length(*new_tokens),
                temperature=0.0 if number % 3 == 0 or greedy else 0.8,
                seed=generator.randrange(1 << 31),
                own=own,
            )
        )
    return works


@dataclass
class Stream:
    """What became of one request. Times are of ``time.perf_counter``.

    Attributes:
        outcome: ``done`` with ``[DONE]``; ``vanished``: we left; ``failed``: anything else, said in ``error``.
        ids: the ids of its events; a stream has one.
        arrivals: when events with tokens came.
    """

    work: Work
    begun: float
    outcome: Literal["done", "vanished", "failed"] = "failed"
    error: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    usage: int | None = None
    ids: set[str] = field(default_factory=set)
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0

    @property
    def count(self) -> int:
        """Tokens that came, as far as is known: an event without ids may hold several."""
        return self.usage or len(self.tokens) or len(self.arrivals)


def check_loopback(url: str) -> str:
    """The URL, or ValueError: load is for servers of this machine that one has started oneself."""
    host = urlsplit(url).hostname or ""
    if host != "localhost":
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise ValueError(f"{url} is not on loopback; this load is only for a server of one's own on this machine")
    return url


async def load(
    url: str,
    model: str,
    works: Sequence[Work],
    *,
    concurrency: int,
    requests: int | None = None,
    seconds: float | None = None,
    vanishing: float = 0.0,
    verified: bool = True,
    seed: int = 0,
    timeout: float = 600.0,
) -> list[Stream]:
    """Keep ``concurrency`` streams open until ``requests`` have been sent or ``seconds`` have gone, then let them end.

    The pool is gone through in order, again and again. A share of ``vanishing`` of the clients closes its connection
    in the middle: before the first token or after a random number of them.

    Args:
        url: the server's, without ``/v1``.
        verified: have the server send token ids, which ``judge`` wants to see; costs both sides a little.
        timeout: seconds that one stream may take.

    Raises ValueError without a bound, or for an address beyond loopback.
    """
    check_loopback(url)
    if requests is None and seconds is None:
        raise ValueError("give requests, seconds or both: load without a bound is refused")
    streams: list[Stream] = []
    until = time.perf_counter() + (math.inf if seconds is None else seconds)
    generator = random.Random(seed)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # a connection each, as 200 users have
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=timeout)) as session:

        async def client() -> None:
            while (requests is None or len(streams) < requests) and time.perf_counter() < until:
                work = works[len(streams) % len(works)]
                leave = generator.randrange(work.max_tokens) if generator.random() < vanishing else None
                stream = Stream(work, time.perf_counter())
                streams.append(stream)
                early = generator.uniform(0.0, 0.5) if leave == 0 else None
                await _follow(session, stream, stream.work.body(model, verified), leave, early)
                stream.ended = time.perf_counter()

        await asyncio.gather(*(client() for _ in range(concurrency)))
    return streams


async def _follow(
    session: aiohttp.ClientSession, stream: Stream, body: dict[str, Any], leave: int | None, early: float | None
) -> None:
    """Read one stream to its end; ``leave`` closes the connection after so many events, ``early`` after seconds, when
    there may not even be an answer."""
    try:
        async with (
            asyncio.timeout(early),
            session.post("/v1/completions", json=body) as response,
        ):
            if response.status != 200:
                stream.error = f"{response.status}: {(await response.text())[:200]}"
                return
            async for line in response.content:
                if line.startswith(b"data:") and _read(stream, line[5:].strip()):
                    return
                if leave and len(stream.arrivals) >= leave:
                    stream.outcome = "vanished"
                    response.close()
                    return
            stream.error = "it ended without [DONE]"
    except TimeoutError as error:
        if early is not None:
            stream.outcome = "vanished"
        else:
            stream.error = f"{type(error).__name__}: {error}"
    except (aiohttp.ClientError, msgspec.MsgspecError, ConnectionError) as error:
        stream.error = f"{type(error).__name__}: {error}"


def _read(stream: Stream, data: bytes) -> bool:
    """Take in an event; whether it was the last."""
    if data == b"[DONE]":
        stream.outcome = "done"
        return True
    event = _event.decode(data)
    if event.error is not None:
        stream.error = f"an error in the stream: {event.error}"
        return True
    if event.id:
        stream.ids.add(event.id)
    if event.usage is not None:
        stream.usage = event.usage.completion_tokens
    for choice in event.choices:
        if choice.token_ids or choice.text:
            stream.arrivals.append(time.perf_counter())
            stream.tokens += choice.token_ids or ()
        stream.finish_reason = choice.finish_reason or stream.finish_reason
    return False


# ----------------------------------------------------------------------------------------------------- judgement


@dataclass
class Verdict:
    """What became of all streams.

    Attributes:
        failed, lost, mixed: reasons, one for each such stream: refused or broken off; ended, but not whole; with what
            is another's.
        unlike: streams that are whole and unmixed, but not token by token the reference's; where the first difference
            is, as a share of the stream. Arithmetic in another batch may do that; a mix-up would be in ``mixed``.
        compared: streams that there was a reference for.
    """

    done: int = 0
    vanished: int = 0
    failed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    unlike: list[float] = field(default_factory=list)
    compared: int = 0

    @property
    def good(self) -> bool:
        return not (self.failed or self.lost or self.mixed)


def judge(streams: Sequence[Stream], references: Mapping[int, Sequence[int]]) -> Verdict:
    """Whether every stream that was not left is complete and nobody else's.

    ``references``: the tokens of a request by its number, generated by other means.
    """
    verdict = Verdict()
    owners = _owners(references)
    times_seen = Counter(identity for stream in streams for identity in stream.ids)
    for stream in streams:
        work, where = stream.work, f"request {stream.work.number}"
        if stream.outcome == "failed":
            verdict.failed.append(f"{where}: {stream.error}")
            continue
        verdict.vanished += stream.outcome == "vanished"
        if len(stream.ids) > 1 or any(times_seen[identity] > 1 for identity in stream.ids):
            verdict.mixed.append(f"{where}: its events have the ids {sorted(stream.ids)}, of which others have some")
        if strangers := set(stream.tokens) - work.own if work.own else ():
            verdict.mixed.append(f"{where}: tokens {sorted(strangers)} are not its own {sorted(work.own)}")
        if stream.outcome == "vanished":
            continue
        verdict.done += 1
        counts = {len(stream.tokens) or work.max_tokens, stream.usage}
        if counts != {work.max_tokens} or stream.finish_reason != "length":
            verdict.lost.append(
                f"{where}: {len(stream.tokens)} tokens came, usage={stream.usage}, finish_reason="
                f"{stream.finish_reason}; {work.max_tokens} tokens were asked for"
            )
            continue
        reference = references.get(work.number)
        if reference is None or not stream.tokens:
            continue
        verdict.compared += 1
        if list(reference) == stream.tokens:
            continue
        if foreign := _foreign(stream.tokens, reference, owners) - {work.number}:
            verdict.mixed.append(f"{where}: {NGRAM} tokens in a row are those of requests {sorted(foreign)}")
            continue
        same = next((at for at, pair in enumerate(zip(reference, stream.tokens)) if pair[0] != pair[1]), 0)  # noqa: B905
        verdict.unlike.append(same / work.max_tokens)
    return verdict


def _ngrams(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[at : at + NGRAM]) for at in range(len(tokens) - NGRAM + 1)}


def _owners(references: Mapping[int, Sequence[int]]) -> dict[tuple[int, ...], int]:
    """Whose reference a row of tokens is, of those that are in one alone."""
    seen: dict[tuple[int, ...], int | None] = {}
    for number, tokens in references.items():
        for row in _ngrams(tokens):
            seen[row] = None if row in seen else number
    return {row: number for row, number in seen.items() if number is not None}


def _foreign(tokens: Sequence[int], reference: Sequence[int], owners: Mapping[tuple[int, ...], int]) -> set[int]:
    return {owners[row] for row in _ngrams(tokens) - _ngrams(reference) if row in owners}
