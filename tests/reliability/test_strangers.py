"""The promises about data, foreign files, clients and terminals in short; a file of its own, for a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_reliability import check_group


@pytest.mark.timeout(600)
@pytest.mark.parametrize("group", ["data", "files", "server", "terminal"])
def test_every_promise_is_kept(group: str, tmp_path: Path):
    check_group(group, tmp_path)
