"""Odd requests: each is refused with the right status and one line, and the server goes on."""

import io
import json
import socket
import struct
import time
import zlib
from contextlib import suppress
from http.client import HTTPException

import pytest
from PIL import Image

from tests.cli import harness
from tests.cli.harness import tiny_data
from tests.serve.harness import QUESTION, image_item, raw_request, text_item


def refused(response, status, param=None, code=None):
    assert response.status == status, response.body
    error = response.error
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code
    return error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"think": True}, "think"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "system", "content": [image_item(b"x")]}, {"role": "user", "content": "x"}]},
         "messages[0].content"),
        ({"messages": [{"role": "user", "content": "an <image> too many"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x"}] * 1001}, "messages"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_used_is_named(server, fields, param):
    refused(server.chat(**fields), 400, param)


def test_what_a_field_may_hold_is_written_as_json(server):
    asked = {"response_format": {"type": "json_object"}}
    assert refused(server.chat(**asked), 400).endswith('leave it out, or give {"type": "text"}')
    assert refused(server.chat(echo=True), 400).endswith("leave it out, or give false")
    assert refused(server.chat(reasoning_effort="high"), 400).endswith("leave it out")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"temperature": NaN}', "NaN is no JSON number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "a number from 0 to 2"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (json.dumps({"messages": []}).encode("utf-16"), "not UTF-8"),
        (b'{"\\ud800": 1}', "unknown field"),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', "does not exist"),
        (b'{"messages": [{"role": "user", "content": "half \\ud83d"}]}', "half a character"),
    ],
)
def test_a_body_that_is_no_request_is_refused(server, body, words):
    response = server.request("POST", "/v1/chat/completions", body)
    assert words in refused(response, 404 if words == "does not exist" else 400)


def test_another_content_type_is_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused(server.request("POST", "/v1/chat/completions", b"{}", content_type=kind), 415)
    refused(server.request("POST", "/v1/chat/completions", b"{}", content_encoding="gzip"), 415)


def test_unknown_addresses_and_methods_have_the_errors_of_the_form(server):
    for path in ("/nothing", "/v1", "/v1/models/", "/v1/models/none", "/page/../../../etc/passwd", "/page/%00", "//"):
        refused(server.request("GET", path), 404)
    response = server.request("GET", "/v1/chat/completions")
    refused(response, 405)
    assert response.headers["allow"] == "POST"
    refused(server.request("OPTIONS", "/v1/chat/completions", origin="http://evil.example"), 405)
    assert server.request("HEAD", "/health").status == 200
    assert server.request("HEAD", "/health").body == b""


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/v1/models", "/page/examples/a.png", "/nowhere"])
def test_a_range_of_any_form_is_ignored(server, path):
    plain = server.request("GET", path)
    for range_ in ("bytes=0-3", "bytes=99999999-", "lines=1-2", "bytes=x", "nonsense", "bytes=0-1,3-4", "bytes=3-1"):
        answer = server.request("GET", path, range=range_)
        assert (answer.status, answer.body) == (plain.status, plain.body), range_


def test_no_answer_lets_another_origin_read_it(server):
    response = server.request("GET", "/v1/models", origin="http://evil.example")
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    assert "default-src 'self'" in response.headers["content-security-policy"]


def test_a_name_that_was_bound_to_this_machine_is_refused(server):
    refused(server.request("GET", "/v1/models", host="evil.example:8000"), 403, code="host_not_allowed")
    refused(server.request("GET", "/v1/models", host="localhost.evil.example"), 403)
    for host in ("localhost", f"127.0.0.1:{server.port}", "[::1]:8000", "LOCALHOST:1"):
        assert server.request("GET", "/v1/models", host=host).status == 200


# --- images -----------------------------------------------------------------------------------------------------------


def png_header(width, height):
    """A PNG that promises pixels and has a few bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def saved(kind, **options):
    file = io.BytesIO()
    Image.open(tiny_data().picture()).save(file, kind, **options)
    return file.getvalue()


def test_images_of_every_usual_form_are_read(server):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    for data in (saved("PNG"), saved("JPEG"), saved("WEBP"), saved("GIF", save_all=True, append_images=frames)):
        assert server.answer([text_item(), image_item(data, "image/png")])  # whatever type it claims
    assert server.answer([image_item(saved("PNG")), image_item(saved("JPEG")), text_item("Which is bigger?")])


def test_a_data_uri_is_read_in_its_forms(server):
    item = image_item(saved("PNG"))
    url = item["image_url"]["url"]
    head, data = url.split(",")
    usual = server.answer([item, text_item()])
    for form in (url.rstrip("="), f"{head},{data.replace('+', '-').replace('/', '_')}", f"data:;base64,{data}",
                 f"{head},{data[:40]}\n{data[40:]}", url.replace("data:image/png", "DATA:image/PNG")):  # fmt: skip
        assert server.answer([{"type": "image_url", "image_url": {"url": form, "detail": "low"}}, text_item()]) == usual
    assert server.answer([{"type": "image_url", "image_url": url}, text_item()]) == usual


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + b"\0" * 100, "zip archive"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 100, "HEIC"),
        (b"<svg xmlns='x'/>", "SVG"),
        (png_header(20_000, 20_000), "exceeds limit"),
        (png_header(2**31 - 1, 1), "exceeds limit"),
        (png_header(100, 100), "cannot be decoded"),
        (saved("JPEG")[:500], "cannot be decoded"),
    ],
)
def test_an_image_that_cannot_be_read_is_refused(server, data, words):
    message = refused(server.chat([text_item(), image_item(data, "image/png")]), 400, "messages", "invalid_image")
    assert words in message


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "/etc/passwd", "http://127.0.0.1/x.png", "https://example.com/x.png", "ftp://x/y.png",
     "data:,", "data:image/png;base64,!!!", "data:text/html;base64,PGI+", "x" * 5000],
)  # fmt: skip
def test_no_file_and_no_address_becomes_an_image(server, url):
    refused(server.chat([{"type": "image_url", "image_url": {"url": url}}, text_item()]), 400)


def test_too_many_images_are_refused(server):
    item = image_item(saved("PNG"))
    refused(server.chat([*[item] * 17, text_item()]), 400, "messages", "too_many_images")


def test_a_prompt_that_is_longer_than_the_context_is_refused(server):
    message = refused(server.chat("star " * 5000), 400, "messages", "context_length_exceeded")
    assert "4096 tokens" in message
    refused(server.chat("x" * 1_000_001), 400, "messages", "context_length_exceeded")


# --- raw HTTP ---------------------------------------------------------------------------------------------------------


def exchange(server, *pieces, end=False):
    """Everything that a server sends for raw bytes until it closes the connection; `end`: they are the last ones."""
    with server.connect() as connection:
        for piece in pieces:
            connection.sendall(piece)
        if end:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionResetError):  # it may close before it has read everything
            while data := connection.recv(65536):
                received += data
        return received


def test_what_is_not_http_is_answered_in_the_form(server):
    for garbage in (b"hello\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n"):
        received = exchange(server, garbage)
        assert received.startswith(b"HTTP/1.1 400 "), received
        assert b'{"error":' in received
    big = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1_000_000
    assert exchange(server, big)[:13] in (b"", b"HTTP/1.1 400 ")
    assert server.chat().status == 200


def test_a_chunked_body_is_read(server):
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2}).encode()
    pieces = [body[at : at + 7] for at in range(0, len(body), 7)]
    chunks = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces)
    received = exchange(server, raw_request(chunks + b"0\r\n\r\n", "Transfer-Encoding: chunked", "Connection: close"))
    assert received.startswith(b"HTTP/1.1 200 "), received


def test_a_request_with_two_lengths_is_refused_and_nothing_behind_it_is_read(server):
    chunked = raw_request(b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked")
    received = exchange(server, chunked + b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 400 "), received
    assert received.count(b"HTTP/1.1") == 1


def test_two_requests_on_one_connection_are_both_answered(server):
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2}).encode()
    received = exchange(server, raw_request(body) + raw_request(body, "Connection: close"))
    assert received.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_sends_no_more_gets_its_answers(server, stream):
    fields = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2, "stream": stream}
    request = raw_request(json.dumps(fields).encode())
    received = exchange(server, request + request + b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", end=True)
    assert received.count(b"HTTP/1.1 200 ") == 3
    assert received.count(b"[DONE]") == 2 * stream
    assert received.endswith(b"}]}")
    assert exchange(server, request[:-3], end=True) == b""
    assert exchange(server, request + request[:-3], end=True).count(b"HTTP/1.1") == 1


@pytest.mark.long
def test_a_body_that_never_ends_is_refused_at_the_limit(start):
    server = start(prepare=small_limits)
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with server.connect() as connection:
        connection.sendall(raw_request(b"", "Transfer-Encoding: chunked"))
        sent = 0
        try:
            while sent < 2**28:
                connection.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
        assert sent < 2**27  # the server has closed the connection
    response = server.request("POST", "/v1/chat/completions", b" " * 1_000_001)
    refused(response, 413, code="request_too_large")
    headers = raw_request(b"", "Content-Length: 99999999999")
    assert exchange(server, headers).startswith(b"HTTP/1.1 413 ")
    huge = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 800_000}}
    refused(server.chat([huge, text_item()]), 413, code="image_too_large")
    assert server.chat().status == 200


@pytest.mark.long
def test_a_client_that_sends_too_slowly_is_ended(start):
    server = start(prepare=small_limits)
    assert exchange(server, b"GET /health HTTP/1.1\r\nHost: ") == b""  # headers that do not arrive
    assert exchange(server, b"") == b""
    received = exchange(server, raw_request(b'{"messages"', "X: y").replace(b": 11\r\n", b": 5000\r\n"))
    assert received.startswith(b"HTTP/1.1 408 ")
    assert server.chat().status == 200


@pytest.mark.long
def test_more_connections_than_the_limit_are_refused(start):
    server = start(prepare=small_limits)
    connections = [server.connect() for _ in range(8)]
    try:
        connections[-1].settimeout(10)
        received = exchange(server)
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"too_many_connections" in received
    finally:
        for connection in connections:
            connection.close()
    answered, end = False, time.monotonic() + harness.PATIENCE
    while not answered and time.monotonic() < end:  # the server notices the closed ones when it likes
        with suppress(OSError, HTTPException):
            answered = server.chat().status == 200
    assert answered


def small_limits():
    from minimind_v.core.serve import limits

    limits.Limits.__init__.__defaults__ = _changed(
        limits.Limits, body=1_000_000, image_bytes=500_000, read_seconds=1.0, connections=8, write_seconds=1.0
    )


def _changed(limits, **changes):
    names = list(limits.__dataclass_fields__)
    return tuple(changes.get(name, default) for name, default in zip(names, limits.__init__.__defaults__, strict=True))
