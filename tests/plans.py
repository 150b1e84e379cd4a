"""What a leader's plan says to a machine of one running pipeline, for tests of the machine alone."""

from __future__ import annotations

from typing import Any

from p2pcluster.core.codec import Message


def stage_of(name: str = "S", kind: str = "stage", **options: Any) -> dict[str, Any]:
    """A stage as a manifest has it, with as much as a machine looks at."""
    return {"name": name, "kind": kind, "reads": name if kind != "source" else None, "ports": [], "timeout_s": None, "processes": 1,
            "batch": None, "concurrency": 1, "max_items": None, **options}


def manifest_of(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"pipeline": "p", "on_done": False, "stages": list(stages), "queues": []}


def planned(manifest: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The pipeline in its first run, in version `v`, but for what `fields` say."""
    return {"manifest": manifest, "version": "v", "run": 1, "state": "running", "project": {}, "zip_sha256": "", "params": None, "paused": {},
            "scaled": {}, "rollout": None, "rolled": None, "on_done_run": 0, "is_over": False, **fields}


def plan(pipeline: dict[str, Any] | None, **processes: int) -> Message:
    """The message; `processes` by stage of the pipeline `p`, of which `pipeline` says what there is, None where it is no more."""
    return Message("plan", {"pipelines": {} if pipeline is None else {"p": pipeline},
                            "processes": {f"p/{stage}": count for stage, count in processes.items()}})
