"""A file at an address that a user named: bounded in bytes and in time, and one line where it does not come."""

import time

import pytest

from minimind_v.core.errors import MissingInput
from minimind_v.core.hub.web import fetch, is_web
from minimind_v.core.version import __version__
from tests.web import serving

CONTENT = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def server():
    with serving(CONTENT) as server:
        yield server


def test_the_content_is_returned_also_behind_a_redirect(server):
    address, handler = server
    assert fetch(address) == fetch(f"{address}/moved") == CONTENT
    assert set(handler.agents) == {f"mmv/{__version__}"}


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("none", "the server answered HTTP 404 Not Found"),
        ("large", "more than 1 MB"),
        ("endless", "more than 1 MB"),
        ("slow", "not received within 0 s"),
        ("cut", "not received"),
    ],
)
def test_what_does_not_come_ends_soon_in_one_line(server, trouble, message):
    begun = time.monotonic()
    with pytest.raises(MissingInput, match=message) as error:
        fetch(f"{server[0]}/{trouble}", most_bytes=1 << 20, seconds=0.3 if trouble == "slow" else 20)
    assert time.monotonic() - begun < 10
    assert f"{server[0]}/{trouble}: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/dog.jpg", "http://[/dog.jpg", "https://", "http://x.invalid/a"]
)
def test_an_address_without_a_server_is_reported(address):
    with pytest.raises(MissingInput, match="not received"):
        fetch(address)


def test_a_redirect_to_a_file_of_this_machine_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("secret")
    with serving(b"") as (address, handler):
        monkeypatch.setattr(handler, "send_header", _send_location(handler.send_header, (tmp_path / "secret").as_uri()))
        with pytest.raises(MissingInput, match="not received"):
            fetch(f"{address}/moved")


def _send_location(send, location):
    return lambda self, name, value: send(self, name, location if name == "Location" else value)


def test_only_http_is_a_web_address():
    assert is_web("HTTP://example.org/a.jpg")
    assert not any(map(is_web, ("file:///a.jpg", "s3://bucket/a.jpg", "a.jpg", "http.jpg")))
