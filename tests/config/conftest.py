from tests.cli.conftest import place  # noqa: F401
