"""Files that ask for more than they say: refused before anything is taken."""

import pytest

from tests.formats.bombs import bombs
from tests.hostile import check_refused


@pytest.mark.long
def test_weights_that_ask_for_more_than_they_say(tmp_path):
    files = {}
    for name, (data, message) in bombs().items():
        (tmp_path / f"{name}.pth").write_bytes(data)
        files[tmp_path / f"{name}.pth"] = message
    check_refused("minimind_v.core.formats.checkpoint:read_checkpoint", files)
