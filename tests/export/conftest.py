from tests.cli.conftest import tiny_data  # noqa: F401
