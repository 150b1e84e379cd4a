"""What becomes of a pipeline's versions: they come in parts, go over the nodes one by one, or go back; and how a pipeline ends.

A version that comes while a run is under way is *rolled out*: each node runs the former one until a logged `roll` names it. Which node is
next, and when a version has proved itself or not, is the leader's decision (`rollouts`); what each of these commands does to the state is
decided here. So whoever leads next goes on where the last one stood.

Ids and runs of a pipeline that was undeployed are never used again, not even by one of the same name: somebody who was away meanwhile may
still report what it did with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING
from zlib import crc32

from p2pcluster.core.codec import Message
from p2pcluster.core.records import Applying, BundlePart, Outcome, PipelineState, Release, Rollout
from p2pcluster.core.rows import RowedState

if TYPE_CHECKING:
    from p2pcluster.core.chunks import Chunk

PREVIOUS_MAX = 2  # versions that are named as those before; the files of fewer are kept


class Deployments(RowedState):
    """The part of `queues.State` that knows of versions."""

    def _maybe_done(self, name: str, context: Applying) -> None:
        raise NotImplementedError

    def discount_body(self, chunk: Chunk) -> None:
        raise NotImplementedError

    # ---- bundles

    def _apply_bundle_part(self, message: Message, context: Applying) -> Outcome:
        key = (message.fields["version"], message.fields["part"])
        if key in self.bundles:
            return Outcome("bundle_part", "already")
        (body,) = message.blobs
        self.bundles[key] = BundlePart(message.fields["parts"], context.index, context.blob_offset(0), len(body), crc32(body))
        self._touch("bundles", key)
        return Outcome("bundle_part", "ok")

    def bundle_parts(self, version: str) -> list[BundlePart] | None:
        """The parts of a version in order, or None when one is missing."""
        first = self.bundles.get((version, 0))
        if first is None:
            return None
        parts = [self.bundles.get((version, part)) for part in range(first.parts)]
        return None if any(part is None for part in parts) else [part for part in parts if part]

    def uploads(self) -> dict[str, int]:
        """The versions of which parts are here and that no pipeline has: they are on their way, or were given up. With how many parts."""
        named = {version for pipeline in self.pipelines.values() for version in pipeline.versions_kept}
        found: dict[str, int] = {}
        for version, _ in self.bundles:
            if version not in named:
                found[version] = found.get(version, 0) + 1
        return found

    def _apply_forget_uploads(self, message: Message, context: Applying) -> Outcome:
        count = self._forget_versions(message.fields["versions"])
        return Outcome("forget_uploads", "ok" if count else "already", {"count": count})

    def _forget_versions(self, versions: Iterable[str]) -> int:
        """Those of them that no pipeline keeps."""
        kept = {version for pipeline in self.pipelines.values() for version in pipeline.versions_kept}
        gone = set(versions) - kept
        keys = [key for key in self.bundles if key[0] in gone]
        for key in keys:
            del self.bundles[key]
            self._touch("bundles", key)
        return len(keys)

    # ---- versions

    def _apply_deploy(self, message: Message, context: Applying) -> Outcome:
        fields = message.fields
        if self.bundle_parts(fields["version"]) is None:
            return Outcome("deploy", "refused", {"code": "parts_missing"})
        name, old = fields["pipeline"], self.pipelines.get(fields["pipeline"])
        release = Release(*(fields[of] for of in ("version", "origin", "manifest", "files", "zip_sha256", "project")))
        if old is None:
            run, first_id = self.ended.pop(name, (0, 1))
            new = PipelineState(name, **release.fields(), run=run, first_id=first_id)
        else:
            new = _following(old, release, context.index)
            if new.rollout is None:
                _keep_controls(old, new)
        self._put_in_force(new, context)
        if old is not None:
            self._forget_versions({old.version, *old.versions_kept})
        rollout = new.rollout.number if new.rollout else None
        return Outcome("deploy", "ok", {"run": new.run, "state": new.state, "rollout": rollout})

    def _put_in_force(self, pipeline: PipelineState, context: Applying) -> None:
        self.pipelines[pipeline.name] = pipeline
        self._touch("projects", pipeline.name)
        self._wire(pipeline)
        pipeline.shares = {}
        self._begin_shares(pipeline)
        self._maybe_done(pipeline.name, context)

    def _rolling(self, message: Message) -> PipelineState | None:
        """The pipeline whose roll-out the command is about, if that is the one that is under way."""
        pipeline = self.pipelines.get(message.fields["pipeline"])
        is_meant = pipeline is not None and pipeline.rollout is not None and pipeline.rollout.number == message.fields["rollout"]
        return pipeline if is_meant else None

    def _apply_roll(self, message: Message, context: Applying) -> Outcome:
        """One node more runs the new version."""
        pipeline, node = self._rolling(message), message.fields["node"]
        if pipeline is None or pipeline.rollout is None or node in pipeline.rollout.nodes:
            return Outcome("roll", "already")
        pipeline.rollout.nodes.append(node)
        self._touch("projects", pipeline.name)
        return Outcome("roll", "ok", {"nodes": len(pipeline.rollout.nodes)})

    def _apply_rolled_out(self, message: Message, context: Applying) -> Outcome:
        """Every node runs the new version."""
        pipeline = self._rolling(message)
        if pipeline is None or pipeline.rollout is None:
            return Outcome("rolled_out", "already")
        rolled = {"version": pipeline.version, "nodes": len(pipeline.rollout.nodes), "failure": None}
        new = replace(pipeline, rollout=None, rolled=rolled)
        _keep_controls(pipeline, new)
        self._put_in_force(new, context)
        return Outcome("rolled_out", "ok")

    def _apply_roll_back(self, message: Message, context: Applying) -> Outcome:
        """The new version did not start: the former one runs on everywhere."""
        pipeline = self._rolling(message)
        if pipeline is None or pipeline.rollout is None:
            return Outcome("roll_back", "already")
        rolled = {"version": pipeline.version, "nodes": len(pipeline.rollout.nodes), "failure": message.fields["failure"]}
        former = pipeline.rollout.former.fields()
        self._put_in_force(replace(pipeline, **former, previous=pipeline.previous[1:], rollout=None, rolled=rolled), context)
        self._forget_versions({pipeline.version})
        return Outcome("roll_back", "ok")

    # ---- the end of a pipeline

    def _apply_undeploy(self, message: Message, context: Applying) -> Outcome:
        pipeline = self.pipelines.get(message.fields["pipeline"])
        if pipeline is None:
            return Outcome("undeploy", "already")
        queues = [queue for queue in self.queues.values() if queue.pipeline == pipeline.name]
        left = {"open": sum(queue.open_count for queue in queues), "parked": sum(len(queue.parked) for queue in queues)}
        if any(left.values()) and not message.fields["discard"]:
            return Outcome("undeploy", "refused", {"code": "items_remain", **left})
        self.ended[pipeline.name] = (pipeline.run, max([pipeline.first_id, *(queue.next_id for queue in queues)]))
        for queue in queues:
            for chunk in queue.chunks:
                self.discount_body(chunk)
            self._remove_queue(queue)
        for key in [key for key in self.producers if key.startswith(f"source:{pipeline.name}/")]:
            del self.producers[key]
            self._touch("producers", key)
        self._unwire(pipeline)
        del self.pipelines[pipeline.name]
        self._touch("projects", pipeline.name)
        self._forget_versions({pipeline.version, *pipeline.versions_kept})
        return Outcome("undeploy", "ok", left)


def _following(old: PipelineState, release: Release, number: int) -> PipelineState:
    """A pipeline behind a deployment. While a run is under way another version is rolled out, in the place of one that still is."""
    new = replace(old, **release.fields())
    base = old.rollout.former if old.rollout else old.release
    if release.version == old.version:  # the same files, for other Pythons or from elsewhere; or it is said again
        new.rolled = None if old.rolled and old.rolled["failure"] else old.rolled
    elif release.version == base.version:  # every node has run that
        new.rollout, new.rolled, new.previous = None, None, old.previous[1:]
    else:
        new.rollout = Rollout(number, base) if old.state == "running" else None
        new.rolled = None
        new.previous = old.previous if old.rollout else [base.version, *old.previous][:PREVIOUS_MAX]
    return new


def _keep_controls(old: PipelineState, new: PipelineState) -> None:
    """What people said at run time holds in a new version too, as long as the stage is there. A stage that stopped by itself runs again: the
    version may have been made for that."""
    is_same = old.version == new.version and old.rollout is None
    new.paused = {name: reason for name, reason in old.paused.items() if (is_same or not reason) and (not name or new.stage(name))}
    kinds = {stage["name"]: stage["kind"] for stage in new.manifest["stages"]}
    new.scaled = {name: count for name, count in old.scaled.items() if kinds.get(name, "source") != "source"}
