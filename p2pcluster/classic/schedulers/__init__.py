"""The schedulers of the older API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2pcluster.classic.schedulers.base import BaseScheduler, ClientInfo


class PipelineReplicate(BaseScheduler):
    """Each client runs the whole pipeline."""

    def schedule(self, info: ClientInfo, functions: Mapping[str, bytes]) -> Any:
        return functions


__all__ = ["BaseScheduler", "ClientInfo", "PipelineReplicate"]
