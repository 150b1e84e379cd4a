"""The errors that people see: one tree, each with a code and whether the outcome is definite.

What is ours alone to get wrong is an `assert` elsewhere and stops the program. What others can get wrong (a user, a disk, a
peer) is a class here. `definite` is true when the operation certainly did not, and never will, happen; it is false when the
caller cannot know and must ask again by the same id. Every message is one line: what, why, what to do next.
"""

from __future__ import annotations


class ClusterError(Exception):
    """Anything p2pcluster raises on purpose.

    Attributes: `code`, a stable short string for programs; `definite`, see the module; `exit_code` for the command line.
    """

    code = "error"
    definite = True
    exit_code = 1


class ProtocolError(ClusterError):
    """A peer and this program do not speak the same protocol."""

    code = "protocol"


class LocalProtocolError(ProtocolError):
    """This side tried to send what the protocol does not allow."""

    code = "protocol_local"


class RemoteProtocolError(ProtocolError):
    """The other side sent what the protocol does not allow."""

    code = "protocol_remote"


class AuthenticationFailed(ProtocolError):
    """The other side does not hold this cluster's key, or speaks for another cluster."""

    code = "authentication"


class NotLeader(ClusterError):
    """This node does not lead; `leader_hint` is the address that may, or None."""

    code = "not_leader"

    def __init__(self, message: str, leader_hint: str | None = None) -> None:
        super().__init__(message)
        self.leader_hint = leader_hint


class Unavailable(ClusterError):
    """No answer within the time. Unless it is `definite` the outcome is unknown: ask again with the same id."""

    code = "unavailable"
    definite = False

    def __init__(self, message: str, definite: bool = False) -> None:
        super().__init__(message)
        self.definite = definite


class ClusterNotFound(ClusterError):
    """No node of the cluster answered."""

    code = "no_cluster"
    exit_code = 4


class NoLeader(ClusterError):
    """Nodes answer, none of them leads."""

    code = "no_leader"
    exit_code = 5


class UnknownName(ClusterError):
    """A queue, stage, pipeline or item that does not exist."""

    code = "unknown_name"


class QueueFull(ClusterError):
    """The queue stayed at its maximum for the whole time; what was to be put may still go in."""

    code = "queue_full"
    definite = False


class ValueRefused(ClusterError):
    """A value that cannot be put: too large, not picklable, or of a class in `__main__`."""

    code = "value_refused"


class GraphError(ClusterError):
    """The stages do not make a pipeline; names stage, file and line."""

    code = "graph"


class ProjectError(ClusterError):
    """The folder or file does not hold a project that can run."""

    code = "project"


class WrongUsage(ClusterError):
    """The words of a command or a call are off."""

    code = "usage"
    exit_code = 2


class BundleRejected(ClusterError):
    """A project that cannot be packed, or a zip that cannot be trusted."""

    code = "bundle"


class HomeError(ClusterError):
    """The home folder, the lock, the key file or the disk does not allow a node here."""

    code = "home"


class JournalError(ClusterError):
    """The journal cannot be used now; nothing in it was changed."""

    code = "journal"


class JournalCorrupt(JournalError):
    """The journal does not hold what was written to it: `what` in a few words; `index` is the first entry that is bad, or None."""

    code = "journal_corrupt"

    def __init__(self, message: str, index: int | None = None, what: str = "") -> None:
        super().__init__(message)
        self.index = index
        self.what = what or message


class Superseded(ClusterError):
    """The cluster goes on without this node's copy, in a new generation or in another cluster of its name: the copy is set aside, and the node
    joins as a new one."""

    code = "superseded"


class RolledBack(ClusterError):
    """A new version did not start where it was tried; the former one runs on."""

    code = "rolled_back"


class ItemsRemain(ClusterError):
    """A pipeline that still has items is not undeployed, unless these may go too."""

    code = "items_remain"


class ItemsParked(ClusterError):
    """The run is done and some items are parked."""

    code = "items_parked"
    exit_code = 3
