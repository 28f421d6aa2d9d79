"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from two_hosts import TwoHosts, start_two_hosts


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Two hosts that DeepSpeed's launcher reaches over pdsh and ssh."""
    yield from start_two_hosts(tmp_path_factory.mktemp("two_hosts"))
