"""One server for the tests that change nothing in it."""

import pytest

from tests.serve.browser import browser, open_page, page, stub, stub_server  # noqa: F401 — fixtures
from tests.serve.harness import Server


@pytest.fixture(scope="package")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("serve"))
    yield server
    server.end()


@pytest.fixture
def start(tmp_path):
    """`start(…)` is a server of the test's own."""
    servers = []

    def begin(*args, **options):
        servers.append(Server(tmp_path / f"server{len(servers)}", *args, **options))
        return servers[-1]

    yield begin
    for server in servers:
        server.end()
