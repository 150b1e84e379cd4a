"""The public names, and that importing them costs and opens nothing."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

import p2pcluster

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    client = types.ModuleType("p2pcluster.client")
    client.connect = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "p2pcluster.client", client)
    assert all(getattr(p2pcluster, name) is not None for name in p2pcluster.__all__)
    assert p2pcluster.connect is client.connect
    assert set(p2pcluster.__all__) <= set(dir(p2pcluster))


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'conect'"):
        p2pcluster.conect


def test_importing_the_package_loads_no_sockets_and_no_database() -> None:
    heavy = {"socket", "selectors", "threading", "asyncio", "subprocess", "sqlite3", "logging", "multiprocessing"}
    script = "import sys; before = set(sys.modules); import p2pcluster; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "p2pcluster.core.graph" in loaded
    assert loaded & heavy == set()
