"""One request to a server with OpenAI's endpoints, and when each piece of its answer came.

Knows HTTP/1.1 over sockets, event streams, and what `vllm bench serve` sends and takes for a token.
Does not know when requests should be sent or what is made of the times. It is plain asyncio because
it shares its cores with the server that it measures.

    first token    the first event that has `choices`, whatever text is in it
    latency        until the last such event; the usage at the end does not count
    tokens         of the usage at the end

An answer that is no stream of events, or that ends with an error event, has failed. (vLLM's client
takes an error after the first token for the end of a good answer.)

Source: vllm/benchmarks/lib/endpoint_request_func.py of vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from pace_nb.errors import ConfigError, PaceError

LONGEST_ANSWER: Final = 6 * 3600.0  # seconds
READ: Final = 2**16  # bytes at a time
MOST_OF_AN_ERROR: Final = 300  # characters that are told
LONGEST_LINE: Final = 2**22  # bytes: of headers, or of the length of a chunk
NO_ANSWER: Final = (  # what reading one raises that is not as it should be
    OSError, EOFError, asyncio.LimitOverrunError, ValueError, TypeError, LookupError,
    AttributeError,
)  # fmt: skip


@dataclass
class Answer:
    """What came of a request. Times are seconds; `start_time` is `time.perf_counter()`.

    Attributes:
        ttft: From sending to the first token.
        itl: Between each event with tokens and the next.
        latency: From sending to the last token.
        queue_time: That it waited here, for others of ours, before it was sent.
        error: Why it failed; "" where it did not.
    """

    prompt_len: int
    start_time: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    queue_time: float = 0.0
    output_tokens: int = 0
    generated_text: str = ""
    error: str = ""

    @property
    def success(self) -> bool:
        """It came to its end."""
        return not self.error


class OpenAIClient:
    """A server, by the address below which its paths are.

    Args:
        base_url: http or https.
        headers: Sent with everything.

    Connections are kept and used again; `async with` ends them.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"{base_url!r}: expected an address such as http://127.0.0.1:8000")
        self.base_url = base_url.rstrip("/")
        self._path = parts.path.rstrip("/")
        self._host, self._netloc = parts.hostname, parts.netloc.rpartition("@")[2]
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._ssl else 80)
        self._headers = dict(headers or {})
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, path: str) -> bytes:
        """A body. PaceError where the server cannot be reached or does not say 200."""
        return await self._whole("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of an answer. PaceError as `get`."""
        return json.loads(await self._whole("POST", path, body))

    async def _whole(self, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        try:
            status, reason, chunks = await self._exchange(method, path, body, {})
            content = await _joined(chunks)
        except OSError as error:
            raise PaceError(f"{self.base_url} cannot be reached: {error}") from error
        if status != 200:
            raise PaceError(f"{self.base_url}{path}: {_complaint(status, reason, content)}")
        return content

    async def ask(
        self, path: str, body: Mapping[str, Any], prompt_len: int, request_id: str
    ) -> Answer:
        """Send a body that asks for a stream, and take the times of what comes. Never raises but
        for cancellation: what goes wrong is the answer's error."""
        answer = Answer(prompt_len)
        answer.start_time = time.perf_counter()
        try:
            async with asyncio.timeout(LONGEST_ANSWER):
                await self._listen(path, body, request_id, answer)
        except TimeoutError:
            answer.error = f"no end within {LONGEST_ANSWER:.0f} s"
        except NO_ANSWER as error:
            answer.error = f"{type(error).__name__}: {error}"
        return answer

    async def _listen(
        self, path: str, body: Mapping[str, Any], request_id: str, answer: Answer
    ) -> None:
        status, reason, chunks = await self._exchange(
            "POST", path, body, {"x-request-id": request_id}
        )
        if status != 200:
            answer.error = _complaint(status, reason, await _joined(chunks))
            return
        last = None
        texts = []
        async with aclosing(chunks), aclosing(events(chunks)) as found_events:
            async for data in found_events:
                if data == "[DONE]":
                    continue
                found = json.loads(data)
                if error := found.get("error"):
                    named = error.get("message") if isinstance(error, dict) else None
                    answer.error = str(named or error)
                elif choices := found.get("choices"):
                    now = time.perf_counter()
                    if last is None:
                        answer.ttft = now - answer.start_time
                    else:
                        answer.itl.append(now - last)
                    last = now
                    delta = choices[0].get("delta")
                    text = choices[0].get("text") if delta is None else delta.get("content")
                    texts.append(text or "")
                elif usage := found.get("usage"):
                    answer.output_tokens = usage.get("completion_tokens") or 0
                    answer.prompt_len = usage.get("prompt_tokens") or answer.prompt_len
        answer.generated_text = "".join(texts)
        if last is not None:
            answer.latency = last - answer.start_time
        elif not answer.error:
            answer.error = "the stream had no token"

    async def __aenter__(self) -> OpenAIClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        """End all connections."""
        idle, self._idle = self._idle, []
        for _, writer in idle:
            writer.close()

    # ---- HTTP/1.1 ----

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str]
    ) -> tuple[int, str, AsyncGenerator[bytes]]:
        """Status, its reason, and the body as it comes; the connection is kept at its end.

        A kept connection that the server has closed meanwhile is replaced by a new one.
        """
        message = self._message(method, path, body, headers)
        while True:
            kept = bool(self._idle)
            if kept:
                reader, writer = self._idle.pop()
            else:
                reader, writer = await asyncio.open_connection(
                    self._host, self._port, ssl=self._ssl, limit=LONGEST_LINE
                )
            try:
                writer.write(message)
                await writer.drain()
                status, reason, found = await _head(reader)
            except (EOFError, ConnectionError):
                writer.close()
                if kept:
                    continue
                raise
            except BaseException:
                writer.close()
                raise
            return status, reason, self._body(reader, writer, found)

    def _message(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str]
    ) -> bytes:
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {self._path}{path} HTTP/1.1", f"Host: {self._netloc}"]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in {**self._headers, **headers}.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + content

    async def _body(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        headers: Mapping[str, str],
    ) -> AsyncGenerator[bytes]:
        whole = False
        try:
            if headers.get("transfer-encoding", "").lower() == "chunked":
                while length := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
                    yield await reader.readexactly(length)
                    await reader.readexactly(2)
                while (await reader.readuntil(b"\r\n")) != b"\r\n":
                    pass  # trailers
            elif "content-length" in headers:
                if length := int(headers["content-length"]):
                    yield await reader.readexactly(length)
            else:
                while data := await reader.read(READ):
                    yield data
                return
            whole = headers.get("connection", "").lower() != "close"
        finally:
            if whole:
                self._idle.append((reader, writer))
            else:
                writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, str, dict[str, str]]:
    """Status line and headers, names in lower case. EOFError where nothing comes."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    _, status, reason = [*lines[0].split(" ", 2), "", ""][:3]
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(status), reason, {name.lower(): value.strip() for name, _, value in pairs}


async def _joined(chunks: AsyncGenerator[bytes]) -> bytes:
    async with aclosing(chunks):
        return b"".join([chunk async for chunk in chunks])


async def events(chunks: AsyncIterable[bytes]) -> AsyncGenerator[str]:
    """The data of each event, as soon as its end has come; comments are left out."""
    buffer = b""
    async for chunk in chunks:
        *whole, buffer = (buffer + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            data = [
                line[5:].removeprefix(b" ")
                for line in event.split(b"\n")
                if line.startswith(b"data:")
            ]
            if data:
                yield b"\n".join(data).decode()


def _complaint(status: int, reason: str, content: bytes) -> str:
    """What a refusal says, in one line."""
    try:
        text = json.loads(content)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        text = content.decode("utf-8", "replace")
    return f"{status} {reason}: {' '.join(str(text).split())[:MOST_OF_AN_ERROR]}"
