"""Images from other hosts: from allowed ones only, at public addresses, in bounded time and size."""

import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import pytest

from minimind_v.core.serve.errors import ApiError
from minimind_v.core.serve.remote import fetch_image
from tests.cli.harness import tiny_data
from tests.serve.harness import image_item, text_item


class Host(BaseHTTPRequestHandler):
    """A host of images that misbehaves at some addresses."""

    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/image.jpg")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        if self.path.startswith("/image.jpg"):
            self.wfile.write(tiny_data().picture().read_bytes())
        while self.path in ("/endless", "/slow"):
            self.wfile.write(b"x" * (65536 if self.path == "/endless" else 1))
            time.sleep(0 if self.path == "/endless" else 0.1)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.daemon_threads, server.paths, server.handle_error = True, [], lambda *arguments: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.name = f"127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def fetch(host, path, allowed=None, most=10**6, seconds=5.0):
    return fetch_image(f"http://{host.name}{path}", allowed or [host.name], most, seconds)


def test_an_image_of_an_allowed_host_is_fetched(host):
    assert fetch(host, "/image.jpg?size=1") == tiny_data().picture().read_bytes()
    assert host.paths == ["/image.jpg?size=1"]


@pytest.mark.parametrize("path", ["/moved", "/none"])
def test_redirects_and_errors_are_not_followed(host, path):
    with pytest.raises(ApiError, match="status"):
        fetch(host, path)
    assert host.paths == [path]


def test_size_and_time_are_bounded(host):
    with pytest.raises(ApiError, match="larger than 1,000,000 bytes"):
        fetch(host, "/endless")
    with suppress(ApiError):
        fetch(host, "/slow", seconds=0.5)  # of its own accord it does not end before 28 hours


@pytest.mark.parametrize("allowed", [["example.com"], ["127.0.0.1"], ["localhost"]])
def test_no_other_host_is_asked(host, allowed):
    with pytest.raises(ApiError, match="not fetched from this host"):
        fetch(host, "/image.jpg", allowed)
    assert not host.paths


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fd00::1"])
def test_a_name_does_not_stand_for_a_private_address(host, address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    entries = [(family, socket.SOCK_STREAM, 6, "", (address, host.server_port))]
    name = f"images.example:{host.server_port}"
    with (
        mock.patch.object(socket, "getaddrinfo", return_value=entries),
        pytest.raises(ApiError, match="private address"),
    ):
        fetch_image(f"http://{name}/image.jpg", [name], 10**6, 5)
    assert not host.paths


@pytest.mark.parametrize(
    "url",
    [
        "http://user:key@HOST/x",
        "http:///x",
        "http://HOST:0/x",
        "http://HOST:99999/x",
        "http://HOST/\r\nX: y",
        "http://[/",
    ],
)
def test_an_address_that_is_not_plain_is_refused(host, url):
    with pytest.raises(ApiError):
        fetch_image(url.replace("HOST", host.name.partition(":")[0]), [host.name, "127.0.0.1"], 10**6, 5)
    assert not host.paths


@pytest.mark.long
def test_a_server_fetches_where_it_may(start, host):
    server = start("--allow-image-host", host.name)
    remote = {"type": "image_url", "image_url": {"url": f"http://{host.name}/image.jpg"}}
    own = image_item(tiny_data().picture().read_bytes())
    assert server.answer([remote, text_item()]) == server.answer([own, text_item()])
    other = {"type": "image_url", "image_url": {"url": "http://example.com/image.jpg"}}
    assert server.chat([other, text_item()]).status == 400
