"""Commands by chance that meet interesting items: repeats, stale fences, ranges half finished, runs that end and begin.

It knows the state only as `queue_model.Model` tells it, and makes nothing that the gateway would refuse.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

from p2pcluster.core import commands
from p2pcluster.core.codec import Message
from p2pcluster.core.commands import Port, lengths_blob
from p2pcluster.core.ranges import Fence, Range, RangeSet
from tests.simulation.queue_model import Model, ModelProducer, deployment, source_key

FENCES = [Fence(node, boot, seq) for node, boot in (("n1", "b1"), ("n1", "b2"), ("n2", "b1")) for seq in (1, 2)]
KEYS = ["red", "green", "blue", "half a \ud83d pair", "ä"]


class Chooser:
    """Makes commands by chance: possible, repeated, late or pointless ones, but none that the gateway refuses."""

    def __init__(self, random: Random, model: Model, serial: int = 0) -> None:
        """`serial` is where the numbers begin that make values differ."""
        self.random = random
        self.model = model
        self._serial = serial
        self._seqs: dict[str, int] = {}  # of the entry that is being made
        self._kinds = [
            kind
            for kind, weight in {
                "client_put": 8,
                "source_put": 6,
                "take": 10,
                "done": 12,
                "part": 8,
                "release": 3,
                "fail": 8,
                "due": 3,
                "session_end": 2,
                "retry": 3,
                "discard": 1,
                "assign": 2,
                "close": 1,
                "control": 2,
                "start_run": 2,
                "deploy": 2,
                "roll": 3,
                "undeploy": 1,
                "forget_uploads": 1,
                "on_done_ran": 1,
                "forget": 1,
                "forget_keys": 1,
                "member": 1,
                "rival": 1,
            }.items()
            for _ in range(weight)
        ]

    def entry(self) -> list[Message]:
        """What one commit brings: mostly a few commands, at times many small puts to one queue."""
        self._seqs.clear()
        if self.random.random() < 0.1:
            return self._small_puts()
        found = [self._maybe_once(message) for _ in range(self.random.randint(1, 4)) for message in self.command()]
        for message in found:
            commands.check(message)
        return found

    def command(self) -> list[Message]:
        return getattr(self, f"_a_{self.random.choice(self._kinds)}")()  # type: ignore[no-any-return]

    def _maybe_once(self, message: Message) -> Message:
        """With a token, which mostly was there before."""
        if message.kind not in commands.ONCE_KINDS or self.random.random() < 0.7:
            return message
        known = [key.rpartition(":")[2] for key in self.model.producers if key.startswith(f"once:{message.kind}:")]
        self._serial += 1
        token = self.random.choice([*known, *known, f"t{self._serial}"])
        return message._replace(fields={**message.fields, "once": token})

    def _name(self, *states: str) -> str:
        """A queue, mostly one that has items in one of the states."""
        fitting = [queue.name for queue in self.model.queues.values() if queue.of(*states)]
        if fitting and self.random.random() < 0.85:
            return self.random.choice(fitting)
        return self.random.choice([*self.model.queues, *self.model.queues, "p/nowhere"])

    def _ranges(self, queue: str, states: Sequence[str]) -> list[Range]:
        """Ranges that begin at items in one of the states, where there are any; apart from each other, in any order."""
        found = self.model.queues.get(queue)
        starts = [item.id for item in found.of(*states)] if found else []
        most = max(found.items, default=0) + 2 if found else 3
        free = RangeSet([(1, most + 8)])
        ranges: list[Range] = []
        for _ in range(self.random.randint(1, 3)):
            lo = self.random.choice(starts) if starts and self.random.random() < 0.8 else self.random.randint(1, most)
            ranges += free.remove(lo, lo + self.random.choice([1, 1, 2, 3, 6]))
        return ranges

    def _new_bodies(self, count: int, origin: str) -> list[bytes]:
        self._serial += 1
        return [
            f"{origin}/{self._serial}.{n}".encode() + b"." * self.random.choice([0, 0, 3, 40]) for n in range(count)
        ]

    # ---- puts

    def _small_puts(self) -> list[Message]:
        """Many of them to one queue, each a little."""
        known = self.model.producers.get("c3", ModelProducer())
        queue = self.random.choice(["p/in", "w/x", "p/d", "p/d"])
        return [
            commands.put("c3", known.epoch, known.seq + 1 + number, [self._port([queue], False)])
            for number in range(12)
        ]

    def _a_client_put(self, queue: str | None = None, keyed: bool = False) -> list[Message]:
        key = self.random.choice(["c1", "c2"])
        known = self.model.producers.get(key)
        last = self._seqs.get(key, known.seq if known else 0)
        seq = max(1, last + self.random.choice([1] * 8 + [0, 2]))
        self._seqs[key] = seq if seq == last + 1 else last
        epoch = (known.epoch if known else 0) + self.random.choice([0] * 9 + [1])
        ports = [self._port([queue or self._name()], keyed or self.random.random() < 0.4)]
        if queue is None and self.random.random() < 0.2:
            ports.append(
                self._port(
                    self.random.sample(sorted({*self.model.queues, "p/nowhere", "w/x"}), 2), self.random.random() < 0.5
                )
            )
        message = commands.put(key, epoch, seq, ports)
        return [message] * self.random.choice([1] * 6 + [2])

    def _port(self, queues: list[str], with_keys: bool) -> Port:
        bodies = self._new_bodies(self.random.randint(1, 4), "root")
        keys = [self.random.choice([*KEYS, None]) for _ in bodies]
        waits = self.random.choice(["not", "not", "not", "for", "until"])
        return Port(
            queues,
            lengths_blob(map(len, bodies)),
            b"".join(bodies),
            None,
            json.dumps(keys).encode() if with_keys else None,
            self.random.randint(0, 60) if waits == "for" else None,
            self.random.randint(0, 60) if waits == "until" else None,
        )

    def _a_assign(self) -> list[Message]:
        fence = self.random.choice(FENCES)
        return [
            Message(
                "assign",
                {
                    "pipeline": self.random.choice(["p", "p", "p", "none"]),
                    "stage": "gen",
                    "shard": self.random.randint(0, 1),
                    "node": fence.node,
                    "boot": fence.boot,
                },
            )
        ]

    def _a_source_put(self) -> list[Message]:
        run = self.model.pipelines["p"].run if "p" in self.model.pipelines else 0
        keys = [source_key("p", run, "gen", shard) for shard in range(2)]
        key = self.random.choice([key for key in keys if key in self.model.producers] or keys)
        known = self.model.producers.get(key, ModelProducer())
        source: dict[str, Any] = (
            {"count": known.count + 2, "hash": f"hash{known.seq}"} if self.random.random() < 0.5 else {}
        )
        source["finished"] = self.random.random() < 0.1
        if self.random.random() < 0.3:
            source["tick_ms"] = self.random.randint(0, 1000)
        bodies = self._new_bodies(self.random.randint(1, 5), "root")
        ports = [Port(["p/a", "p/b"], lengths_blob(map(len, bodies)), b"".join(bodies))]
        message = commands.put(
            key,
            max(0, known.epoch - self.random.choice([0] * 9 + [1])),
            max(1, known.seq + self.random.choice([1] * 8 + [0, 2])),
            [] if source["finished"] and self.random.random() < 0.7 else ports,
            source,
            b"cursor %d" % known.seq if self.random.random() < 0.4 else None,
        )
        return [message] * self.random.choice([1] * 6 + [2])

    # ---- work

    def _a_take(self) -> list[Message]:
        queue = self._name("ready")
        return [commands.take(queue, self._ranges(queue, ("ready",)), self.random.choice(FENCES))]

    def _fence_of(self, queue: str, item_id: int) -> Fence:
        found = self.model.queues.get(queue)
        item = found.items.get(item_id) if found else None
        if item is None or item.fence is None or self.random.random() < 0.2:
            return self.random.choice(FENCES)
        return item.fence

    def _a_done(self) -> list[Message]:
        queue = self._name("leased")
        ranges = self._ranges(queue, ("leased",))
        ids = [i for lo, hi in ranges for i in range(lo, hi)]
        whole = self.random.random() < 0.15
        ports = [port for outputs in self._outputs(queue) for port in self._output(queue, outputs, ids, whole)]
        fences = [self._fence_of(queue, lo) for lo, _ in ranges] if whole and self.random.random() < 0.9 else None
        return [commands.done(queue, ranges, ports, whole, fences)] * self.random.choice([1] * 5 + [2])

    def _a_part(self) -> list[Message]:
        """Some of what an item emits, and mostly more of it, or its end; the next command may be one that takes the item away."""
        queue = self._name("leased")
        lo, hi = self._ranges(queue, ("leased",))[0]
        fence = self._fence_of(queue, lo)
        known = self.model.queues[queue].items[lo].parts if queue in self.model.queues and lo in self.model.queues[queue].items else 0
        first = self.random.choice([known] * 8 + [0, known + 1])
        last = first + self.random.randint(0, 2)
        found = [
            commands.part(queue, lo, fence, number, [
                port for outputs in self._outputs(queue) for port in self._output(queue, outputs, [lo], True)])
            for number in range(first, last + 1)
        ]
        if self.random.random() < 0.4:
            ranges = [(lo, self.random.choice([lo + 1, hi]))]
            ports = [port for outputs in self._outputs(queue) for port in self._output(queue, outputs, [lo], True)]
            count = last + 1 + self.random.choice([0] * 8 + [1])
            found.append(commands.done(queue, ranges, ports[: self.random.randint(0, 2)], True, [fence], count))
        return found

    def _outputs(self, queue: str) -> list[list[str]]:
        """The queues of each port of the stage that reads the queue."""
        found = self.model.queues.get(queue)
        if found is None or found.record is None or not found.record["read_by"]:
            return []
        stage = self.model.pipelines[found.pipeline].stage(found.record["read_by"])
        assert stage is not None
        return [[f"{found.pipeline}/{name}" for name in port["queues"]] for port in stage["ports"]]

    def _output(self, queue: str, outputs: list[str], ids: list[int], whole: bool) -> list[Port]:
        if whole:
            bodies = self._new_bodies(self.random.randint(1, 3), f"{queue}#{ids[0]}")
            return [Port(outputs, lengths_blob(map(len, bodies)), b"".join(bodies))]
        told = self.random.random() < 0.5
        counts = [self.random.choice([0, 1, 1, 2]) if told else 1 for _ in ids]
        bodies = [
            body for i, count in zip(ids, counts, strict=True) for body in self._new_bodies(count, f"{queue}#{i}")
        ]
        if not bodies:
            return []
        return [Port(outputs, lengths_blob(map(len, bodies)), b"".join(bodies), lengths_blob(counts) if told else None)]

    def _a_release(self) -> list[Message]:
        queue = self._name("leased")
        ranges = self._ranges(queue, ("leased",))
        return [commands.release(queue, ranges, self._fence_of(queue, ranges[0][0]))]

    def _a_fail(self) -> list[Message]:
        queue = self._name("leased")
        item_id = self._ranges(queue, ("leased",))[0][0]
        error = {"type": "ValueError", "text": self.random.choice(["no", "half a \ud83d pair"]), "traceback": None}
        message = commands.fail(queue, item_id, self._fence_of(queue, item_id), error, self.random.randint(0, 60))
        if self.random.random() < 0.5:  # as who reads a queue that is fed from outside and read by no stage
            message.fields["retries"] = self.random.randint(0, 3)
        return [message] * self.random.choice([1] * 5 + [2])

    def _ids(self, queue: str, *states: str) -> list[int]:
        found = self.model.queues.get(queue)
        chosen = [item.id for item in found.of(*states) if self.random.random() < 0.7] if found else []
        return chosen + [self.random.randint(1, 9)] * self.random.choice([0, 0, 2])

    def _a_due(self) -> list[Message]:
        queue = self._name("delayed")
        return [Message("due", {"queue": queue, "ids": self._ids(queue, "delayed")})]

    def _a_session_end(self) -> list[Message]:
        fence = self.random.choice(FENCES)
        ran: dict[str, list[Any]] = {
            name: self._ids(name, "leased") for name in self.model.queues if self.random.random() < 0.5
        }
        for name in self.model.queues:
            if self.random.random() < 0.2:
                ran.setdefault(name, []).append(list(self._ranges(name, ("leased",))[0]))
        return [
            commands.session_end(
                fence.node,
                fence.boot,
                ran if self.random.random() < 0.6 else None,
                {"type": "NodeDied", "text": "", "traceback": None},
                5,
            )
        ]

    def _a_retry(self) -> list[Message]:
        queue = self._name("parked")
        return [
            Message("retry", {"queue": queue, "ids": self.random.choice([None, self._ids(queue, "parked", "ready")])})
        ]

    def _a_discard(self) -> list[Message]:
        queue = self._name("parked")
        return [
            Message(
                "discard",
                {"queue": queue, "ids": self.random.choice([None, *[self._ids(queue, "parked", "leased")] * 5])},
            )
        ]

    # ---- the rest

    def _a_close(self) -> list[Message]:
        return [
            Message("close", {"pipeline": name, "name": self.random.choice(names)})
            for name, names in (("p", ["gen", "in", "in", "left", "nothing"]), ("w", ["x"]), ("none", ["x"]))
            if self.random.random() < 0.5
        ]

    def _a_control(self) -> list[Message]:
        """Pauses and numbers of processes, which go over what the code says."""
        fields: dict[str, Any] = {"pipeline": self.random.choice(["p", "p", "p", "w", "none"])}
        fields["stage"] = self.random.choice([None, "gen", "left", "left", "eat", "nothing"])
        if self.random.random() < 0.4:
            return [Message("pause", {**fields, "reason": self.random.choice(["", "", "too many parked"])})]
        if fields["stage"] is None or self.random.random() < 0.6:
            return [Message("resume", fields)]
        return [Message("scale", {**fields, "processes": self.random.choice([None, 1, 3, "auto"])})]

    def _a_start_run(self) -> list[Message]:
        """A run ends so seldom by chance that this ends it first, or nearly; puts with keys begin the next one."""
        start = Message("start_run", {"pipeline": self.random.choice(["p", "p", "p", "w", "none"]), "params": {"n": 1}})
        if self.random.random() < 0.3:
            return [start]
        run = self.model.pipelines["p"].run if "p" in self.model.pipelines else 0
        ends = [Message("close", {"pipeline": "p", "name": name}) for name in ("gen", "in")]
        if self.random.random() < 0.4:
            key = source_key("p", run, "gen", self.random.randint(0, 1))
            producer = self.model.producers.get(key, ModelProducer(epoch=1))
            ends[0] = commands.put(key, producer.epoch, producer.seq + 1, [], {"finished": True})
        left = self.random.choice(
            [None, *[queue.name for queue in self.model.queues.values() if queue.of("delayed", "leased", "parked")]]
        )
        others = [item.id for item in self.model.queues[left].of("ready", "leased")] if left else []
        if left and others and self.random.random() < 0.7:  # what is left is then delayed or parked
            ends.append(commands.done(left, [(i, i + 1) for i in others], []))
        ends += [
            Message("discard", {"queue": name, "ids": None})
            for name, queue in self.model.queues.items()
            if name != left and ((queue.record and queue.record["read_by"]) or self.random.random() < 0.2)
        ]
        again = [message for _ in range(2) for message in self._a_client_put("p/in", keyed=True)]
        return [*ends, *again, start, *again]

    def _a_deploy(self) -> list[Message]:
        again = [p.version for p in self.model.pipelines.values() if p.rolling and p.rolling["nodes"]]
        messages = deployment(self.random.choice([*again * 2, "v1", "v2", "v3", "w1"]))
        return self.random.choice([messages] * 8 + [messages[1:], messages[:1]])

    def _a_roll(self) -> list[Message]:
        """A step of a roll-out, mostly of one that is under way, and often its last one."""
        rolling = [(name, p.rolling["number"]) for name, p in self.model.pipelines.items() if p.rolling]
        name, number = self.random.choice([*rolling * 3, ("p", self.random.randint(1, 9)), ("none", 1)])
        fields: dict[str, Any] = {"pipeline": name, "rollout": number}
        return [
            self.random.choice(
                [
                    *[Message("roll", {**fields, "node": self.random.choice(["n1", "n2"])})] * 3,
                    Message("rolled_out", fields),
                    Message("roll_back", {**fields, "failure": {"node": "n1", "stage": "left", "text": "no"}}),
                ]
            )
        ]

    def _a_undeploy(self) -> list[Message]:
        """Mostly of what nobody would miss; and then it may come again."""
        name = self.random.choice(["w", "w", "w", "p", "none"])
        ends = [Message("undeploy", {"pipeline": name, "discard": self.random.random() < 0.5})]
        version = {"w": "w1", "p": self.random.choice(["v1", "v2"])}.get(name)
        if version is None or (name == "w" and self.random.random() < 0.4):
            return ends
        return [*ends, *deployment(version), Message("start_run", {"pipeline": name, "params": None})]

    def _a_forget_uploads(self) -> list[Message]:
        return [Message("forget_uploads", {"versions": self.random.sample(["v1", "v2", "v3", "w1"], 2)})]

    def _a_on_done_ran(self) -> list[Message]:
        return [
            Message("on_done_ran", {"pipeline": self.random.choice(["p", "none"]), "run": self.random.randint(0, 3)})
        ]

    def _a_forget(self) -> list[Message]:
        return [Message("forget", {"producers": [self.random.choice(["c1", "c2", "c9"])]})]

    def _a_forget_keys(self) -> list[Message]:
        before_ms = max(0, self.model.at_ms - self.random.choice([0, 20, 100]))
        return [Message("forget_keys", {"queue": self.random.choice(["p/in", "w/x", "p/nowhere"]), "before_ms": before_ms})]

    def _a_rival(self) -> list[Message]:
        cluster = self.random.choice(["k1", "k2"])
        if self.random.random() < 0.1:
            return [Message("dissolve", {"into": cluster})]
        return [Message("accept", {"cluster": cluster})]

    def _a_member(self) -> list[Message]:
        node = self.random.choice(["n1", "n2"])
        if self.random.random() < 0.3:
            return [Message("member_left", {"node": node})]
        return [Message("member", {"node": node, "name": "host", "facts": {"cores": self.random.randint(1, 2)}})]
