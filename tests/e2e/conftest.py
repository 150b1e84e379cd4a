"""Places for nodes: one for each test, or one node that a module's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Site


@pytest.fixture(scope="session", autouse=True)
def plain_environment() -> Iterator[None]:
    """What a person has set for nodes of their own is not for these."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("P2PCLUSTER_")]:
            patch.delenv(name)
        patch.setenv("P2PCLUSTER_BIND", "127.0.0.1")  # a client that looks for its cluster asks this machine alone
        yield


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A place of the test's own."""
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A place with a running node without a project, to which tests deploy pipelines, each under its own name."""
    made = Site(tmp_path_factory.mktemp("shared"))
    made.hands()
    yield made
    made.close()
