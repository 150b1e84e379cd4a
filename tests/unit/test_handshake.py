"""Who gets a session and who does not: honest pairs, mistakes that a person can remove, attackers without the key."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import struct
from typing import Any

import pytest

from p2pcluster import config
from p2pcluster.core import handshake as module
from p2pcluster.core.codec import Buffer, Message, decode, encode_bytes
from p2pcluster.core.handshake import Handshake, Identity, Opener, Sealer, Session, derive_key, key_id, subkey
from p2pcluster.errors import (
    AuthenticationFailed,
    ClusterError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)

KEY = derive_key(b"a key")


def identity(node_id: str = "n1", **changes: Any) -> Identity:
    return dataclasses.replace(
        Identity(
            node_id=node_id,
            boot_id=f"boot-of-{node_id}",
            role="node",
            name=f"host-{node_id}",
            cluster_name="default",
            cluster_id=None,
            protocol=1,
            package="0.1.0",
            python="3.11.7",
            facts={"cores": 2, "tags": ["gpu"], "memory_gb": 15.5},
        ),
        **changes,
    )


def dialler(me: Identity | None = None, key: bytes = KEY, nonce: bytes = b"d" * 32) -> Handshake:
    return Handshake("dial", key, me or identity("n1"), nonce)


def accepter(me: Identity | None = None, key: bytes = KEY, nonce: bytes = b"a" * 32) -> Handshake:
    return Handshake("accept", key, me or identity("n2"), nonce)


def joined(parts: list[Buffer] | None) -> bytes:
    assert parts is not None
    return b"".join(parts)


def run(dial: Handshake, accept: Handshake) -> tuple[Session, Session]:
    hello = joined(dial.start())
    assert accept.start() is None
    proof = joined(dial.receive(joined(accept.receive(hello))))
    assert dial.receive(joined(accept.receive(proof))) is None
    assert dial.session is not None and accept.session is not None
    return dial.session, accept.session


def both_errors(dial: Handshake, accept: Handshake) -> tuple[ClusterError, ClusterError]:
    """What the accepting side says about `hello`, and what the dialling side makes of the refusal."""
    with pytest.raises(ClusterError) as at_accept:
        accept.receive(joined(dial.start()))
    with pytest.raises(ClusterError) as at_dial:
        dial.receive(joined(accept.refusal(str(at_accept.value))))
    return at_dial.value, at_accept.value


def altered(payload: bytes, **fields: Any) -> bytes:
    message = decode(payload)
    return encode_bytes(message._replace(fields={**message.fields, **fields}))


def sent(session: Session, payload: bytes) -> bytes:
    return b"".join(session.sealer.seal([payload]))


# --- Honest pairs -----------------------------------------------------------------------------------------------------


def test_two_sides_with_the_key_learn_who_the_other_is() -> None:
    a, b = identity("n1", role="client"), identity("n2", cluster_id="c1", facts={"cores": 64})

    at_dial, at_accept = run(dialler(a), accepter(b))

    assert (at_dial.me, at_dial.peer) == (a, b)
    assert (at_accept.me, at_accept.peer) == (b, a)


def test_frames_pass_both_ways_in_order() -> None:
    at_dial, at_accept = run(dialler(), accepter())

    for number in range(3):
        for source, target in ((at_dial, at_accept), (at_accept, at_dial)):
            assert target.opener.open(sent(source, b"frame %d" % number)) == b"frame %d" % number


def test_sealing_copies_no_part() -> None:
    at_dial, _ = run(dialler(), accepter())
    blob = bytearray(100_000)

    parts = at_dial.sealer.seal([b"head", blob])

    assert parts[1] is blob
    assert [len(part) for part in parts] == [4, 100_000, module.TAG_BYTES]


def test_a_frame_carries_hmac_sha256_over_its_place_its_length_and_its_bytes() -> None:
    sealer = Sealer(b"k" * 32)
    for place in range(3):
        expected = hmac.new(b"k" * 32, struct.pack(">QI", place, 5) + b"hello", hashlib.sha256).digest()[:16]
        assert sealer.seal([b"he", b"llo"])[-1] == expected


def test_each_proof_is_hmac_sha256_under_its_own_label_over_all_that_was_said() -> None:
    dial, accept = dialler(), accepter()
    hello = joined(dial.start())
    welcome = joined(accept.receive(hello))
    proof = joined(dial.receive(welcome))
    accepted = joined(accept.receive(proof))

    for label, payload, before in (
        (b"proof", proof, (hello, welcome)),
        (b"accepted", accepted, (hello, welcome, proof)),
    ):
        facts, code = decode(payload).blobs
        said = b"".join(struct.pack(">I", len(part)) + part for part in (*before, bytes(facts)))
        assert code == hmac.new(KEY, b"p2pcluster " + label + b" of a handshake\0" + said, hashlib.sha256).digest()


def test_the_layout_that_lets_two_versions_meet_does_not_change() -> None:
    hello = joined(dialler(identity("n1", protocol=7)).start())
    refusal = joined(dialler(identity("n1", protocol=7)).refusal("because"))

    assert b'["hello",{"magic":"p2pcluster","protocol":7,"package":"0.1.0",' in hello
    assert b'["refuse",{"magic":"p2pcluster","protocol":7,"package":"0.1.0",' in refusal


def test_the_messages_are_those_that_are_listed() -> None:
    dial, accept = dialler(), accepter()
    hello = joined(dial.start())
    welcome = joined(accept.receive(hello))
    proof = joined(dial.receive(welcome))
    accepted = joined(accept.receive(proof))
    refuse = joined(dial.refusal("because"))

    assert tuple(decode(payload).kind for payload in (hello, welcome, proof, accepted, refuse)) == module.KINDS


@pytest.mark.parametrize(("here", "there"), [(None, None), (None, "c1"), ("c1", None), ("c1", "c1"), ("c1", "c2")])
def test_another_cluster_of_the_same_name_and_key_is_let_in_and_says_which(here: str | None, there: str | None) -> None:
    at_dial, at_accept = run(dialler(identity("n1", cluster_id=here)), accepter(identity("n2", cluster_id=there)))

    assert (at_accept.peer.cluster_id, at_dial.peer.cluster_id) == (here, there)


# --- Keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [b"\0", b"x", b"\xff" * 64, b"x" * 100_000])
def test_any_content_of_a_key_file_makes_a_key(secret: bytes) -> None:
    assert len(derive_key(secret)) == 32
    assert derive_key(secret) != derive_key(secret + b"\n")


def test_an_empty_key_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        derive_key(b"")


def test_a_key_for_one_purpose_says_nothing_about_another() -> None:
    assert len({KEY, subkey(KEY, "datagrams"), subkey(KEY, "frames")}) == 3


def test_a_key_id_is_short_and_belongs_to_its_key() -> None:
    assert key_id(KEY) == key_id(derive_key(b"a key")) != key_id(derive_key(b"another"))
    assert len(key_id(KEY)) == 8


def test_neither_key_nor_facts_are_in_what_a_stranger_can_see() -> None:
    secret = {"tags": ["secret-tag"]}
    accept = accepter(identity("n2", facts=secret))

    welcome = joined(accept.receive(joined(dialler().start())))

    assert KEY not in welcome and KEY.hex().encode() not in welcome
    assert b"secret-tag" not in welcome
    assert decode(welcome).blobs == (b"a" * 32,), "a nonce, and no proof to guess the key from"


# --- Mistakes that a person can remove --------------------------------------------------------------------------------


def test_another_key_is_told_to_both_sides_with_both_commands() -> None:
    other = derive_key(b"another key")

    errors = both_errors(dialler(), accepter(key=other))

    for error, theirs, ours in zip(errors, (other, KEY), (KEY, other), strict=True):
        assert isinstance(error, AuthenticationFailed)
        assert key_id(theirs) in str(error) and key_id(ours) in str(error)
        assert "`python -m p2pcluster key` there" in str(error) and "`python -m p2pcluster key --set` here" in str(error)


def test_another_cluster_is_told_to_both_sides_with_both_names() -> None:
    errors = both_errors(dialler(), accepter(identity("n2", cluster_name="lab")))

    for error in errors:
        assert isinstance(error, AuthenticationFailed)
        assert "'lab'" in str(error) and "'default'" in str(error) and "--cluster" in str(error)


def test_another_protocol_version_is_told_to_both_sides_with_both_versions() -> None:
    errors = both_errors(dialler(), accepter(identity("n2", protocol=2, package="9.9")))

    for error in errors:
        assert type(error) is ProtocolError
        assert "protocol 1" in str(error) and "protocol 2" in str(error) and "'9.9'" in str(error)


def test_a_later_version_is_recognised_by_its_number_whatever_else_it_says() -> None:
    hello = encode_bytes(Message("hello", {"magic": "p2pcluster", "protocol": 99, "unheard": [1]}))

    with pytest.raises(ProtocolError, match="protocol 99"):
        accepter().receive(hello)


def test_the_outermost_difference_is_told_first() -> None:
    stranger = identity("n2", protocol=2, cluster_name="lab")

    error, _ = both_errors(dialler(), accepter(stranger, key=derive_key(b"another")))

    assert "protocol 2" in str(error)


def test_a_program_that_dials_itself_is_told_so() -> None:
    _, error = both_errors(dialler(identity("n1")), accepter(identity("n1")))

    assert "reached itself" in str(error)


def test_a_client_on_a_node_may_use_that_nodes_ids() -> None:
    run(dialler(identity("n1", role="client")), accepter(identity("n1")))


def test_facts_that_do_not_fit_are_refused_at_home_before_anything_is_sent() -> None:
    with pytest.raises(LocalProtocolError, match="fewer or shorter tags"):
        dialler(identity("n1", facts={"tags": ["x" * 4096]}))


def test_facts_just_below_the_limit_pass_both_ways() -> None:
    size = config.PREAUTH_BYTES_MAX
    while True:
        facts = {"tags": ["x" * size]}
        try:
            pair = dialler(identity("n1", facts=facts)), accepter(identity("n2", facts=facts))
        except LocalProtocolError:
            size -= 1
            continue
        break
    assert size > 3000

    run(*pair)


@pytest.mark.parametrize("name", ["", "x" * 101, "two\nlines", "\x1b[31m", "right\u202eleft"])
def test_a_name_that_could_not_be_shown_is_refused_at_home(name: str) -> None:
    with pytest.raises(LocalProtocolError) as raised:
        dialler(identity("n1", name=name))
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "field", ["node_id", "boot_id", "name", "cluster", "package", "python", "cluster_id", "key_id"]
)
@pytest.mark.parametrize("value", ["", "x" * 101, "\x1b[31mred", 7, ["x"], {}])
def test_an_identity_that_could_not_be_shown_is_refused_at_the_door(field: str, value: object) -> None:
    with pytest.raises(RemoteProtocolError):
        accepter().receive(altered(joined(dialler().start()), **{field: value}))


@pytest.mark.parametrize("value", [True, "1", None, 1.0, [1]])
def test_a_protocol_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(RemoteProtocolError):
        accepter().receive(altered(joined(dialler().start()), protocol=value))


# --- Refusals are a stranger's words ----------------------------------------------------------------------------------


def refusal(**fields: Any) -> bytes:
    known = {"magic": "p2pcluster", "protocol": 1, "package": "0.1.0", "cluster": "default", "key_id": key_id(KEY)}
    return encode_bytes(Message("refuse", known | fields))


def test_a_reason_is_shown_as_what_the_other_side_says() -> None:
    dial = dialler()
    dial.start()

    with pytest.raises(AuthenticationFailed, match="and says: 'too many of you'"):
        dial.receive(refusal(reason="too many of you"))


@pytest.mark.parametrize("reason", ["x" * 4000, "a\nb\x1b[2J\u202e" * 50, None, {"deep": []}, 7])
def test_a_reason_is_one_short_printable_line_whatever_it_was(reason: object) -> None:
    dial = dialler()
    dial.start()

    with pytest.raises(AuthenticationFailed) as raised:
        dial.receive(refusal(reason=reason))

    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400


def test_a_refusal_is_not_answered_with_a_refusal() -> None:
    dial = dialler()
    dial.start()
    with pytest.raises(AuthenticationFailed):
        dial.receive(refusal(reason="no"))

    assert dial.refusal("no yourself") is None


def test_a_refusal_before_anything_was_said_ends_the_accepting_side_too() -> None:
    accept = accepter()
    with pytest.raises(AuthenticationFailed):
        accept.receive(refusal(reason="no"))

    assert accept.session is None


def test_every_sentence_is_one_line() -> None:
    pairs = [
        (dialler(), accepter(key=derive_key(b"other"))),
        (dialler(), accepter(identity("n2", cluster_name="x" * 64))),
        (dialler(), accepter(identity("n2", protocol=2))),
        (dialler(identity("n1")), accepter(identity("n1"))),
    ]
    for dial, accept in pairs:
        for error in both_errors(dial, accept):
            assert str(error).isprintable()


# --- Attackers without the key ----------------------------------------------------------------------------------------


def test_a_reflected_hello_is_no_welcome() -> None:
    dial = dialler()
    hello = joined(dial.start())

    with pytest.raises(RemoteProtocolError, match="'welcome' is due"):
        dial.receive(hello)


def test_a_hello_reflected_as_a_welcome_is_recognised_as_our_own() -> None:
    dial = dialler()
    welcome = encode_bytes(decode(joined(dial.start()))._replace(kind="welcome"))

    with pytest.raises(RemoteProtocolError, match="reached itself"):
        dial.receive(welcome)


def test_a_reflected_proof_proves_nothing() -> None:
    dial = dialler()
    hello = decode(joined(dial.start()))
    fields = hello.fields | {"node_id": "n2", "boot_id": "b2"}
    proof = decode(joined(dial.receive(encode_bytes(Message("welcome", fields, hello.blobs)))))

    with pytest.raises(AuthenticationFailed):
        dial.receive(encode_bytes(proof._replace(kind="accepted")))
    assert dial.session is None


@pytest.mark.parametrize("kind", ["hello", "welcome", "accepted", "anything"])
def test_who_has_not_proven_the_key_is_given_no_proof_whatever_he_says(kind: str) -> None:
    accept = accepter()
    accept.receive(joined(dialler().start()))

    with pytest.raises(RemoteProtocolError, match="'proof' is due"):
        accept.receive(encode_bytes(Message(kind, {}, (b"", b""))))


def test_a_proof_made_with_another_key_is_refused_though_the_key_ids_are_equal() -> None:
    dial, accept = dialler(key=derive_key(b"another")), accepter()
    hello = altered(joined(dial.start()), key_id=key_id(KEY))
    welcome = altered(joined(accept.receive(hello)), key_id=key_id(derive_key(b"another")))

    with pytest.raises(AuthenticationFailed, match="could not prove"):
        accept.receive(joined(dial.receive(welcome)))


def test_a_recorded_handshake_cannot_be_played_to_another_nonce() -> None:
    dial, accept = dialler(), accepter()
    hello = joined(dial.start())
    proof = joined(dial.receive(joined(accept.receive(hello))))
    accept.receive(proof)
    later = accepter(nonce=b"b" * 32)
    later.receive(hello)

    with pytest.raises(AuthenticationFailed, match="could not prove"):
        later.receive(proof)
    assert later.session is None


def test_a_recorded_listener_cannot_be_played_to_another_nonce() -> None:
    dial, accept = dialler(), accepter()
    welcome = joined(accept.receive(joined(dial.start())))
    accepted = joined(accept.receive(joined(dial.receive(welcome))))
    later = dialler(nonce=b"e" * 32)
    later.start()
    later.receive(welcome)

    with pytest.raises(AuthenticationFailed, match="could not prove"):
        later.receive(accepted)
    assert later.session is None


@pytest.mark.parametrize(
    "change",
    [
        {"role": "client"},
        {"node_id": "n9"},
        {"boot_id": "b9"},
        {"name": "another"},
        {"cluster_id": "c9"},
        {"package": "9.9"},
        {"python": "3.12.0"},
        {"unheard": 1},
    ],
    ids=str,
)
def test_a_relay_that_alters_who_dials_is_found_out_by_both(change: dict[str, Any]) -> None:
    dial, accept = dialler(identity("n1", role="node")), accepter()
    welcome = joined(accept.receive(altered(joined(dial.start()), **change)))

    with pytest.raises(AuthenticationFailed):
        accept.receive(joined(dial.receive(welcome)))
    assert accept.session is None and dial.session is None


@pytest.mark.parametrize("change", [{"node_id": "n9"}, {"boot_id": "b9"}, {"cluster_id": "c9"}, {"name": "x"}], ids=str)
def test_a_relay_that_alters_who_accepts_is_found_out(change: dict[str, Any]) -> None:
    dial, accept = dialler(), accepter()
    welcome = altered(joined(accept.receive(joined(dial.start()))), **change)

    with pytest.raises(AuthenticationFailed):
        accept.receive(joined(dial.receive(welcome)))
    assert accept.session is None and dial.session is None


def test_a_lured_client_cannot_be_passed_off_as_a_node() -> None:
    client, accept = dialler(identity("n1", role="client")), accepter()
    welcome = joined(accept.receive(altered(joined(client.start()), role="node")))

    with pytest.raises(AuthenticationFailed):
        accept.receive(joined(client.receive(welcome)))


def test_a_client_cannot_be_the_one_that_accepts() -> None:
    dial, accept = dialler(), accepter()
    welcome = joined(accept.receive(joined(dial.start())))

    with pytest.raises(RemoteProtocolError, match="says it is a 'client'"):
        dial.receive(altered(welcome, role="client"))
    with pytest.raises(AssertionError):
        accepter(identity("n2", role="client"))


def test_facts_cannot_be_altered_on_their_way() -> None:
    dial, accept = dialler(), accepter()
    proof = decode(joined(dial.receive(joined(accept.receive(joined(dial.start()))))))
    facts = encode_bytes(Message("facts", {"cores": 1000}))

    with pytest.raises(AuthenticationFailed):
        accept.receive(encode_bytes(proof._replace(blobs=(facts, proof.blobs[1]))))


def relayed() -> tuple[Session, Session]:
    """The handshake as a relay without the key sees it pass: every message unaltered, on two sockets that it holds."""
    return run(dialler(identity("n1", role="client")), accepter())


def test_a_relay_that_keeps_the_authenticated_socket_cannot_say_anything_on_it() -> None:
    _, listener = relayed()

    for injected in (b"", b"x", b"a command" + bytes(16), bytes(module.TAG_BYTES)):
        _, listener = relayed()
        with pytest.raises(AuthenticationFailed, match="injected"):
            listener.opener.open(injected)


def test_a_relay_cannot_send_a_frame_twice() -> None:
    client, listener = relayed()
    frame = sent(client, b"a command")
    listener.opener.open(frame)

    with pytest.raises(AuthenticationFailed):
        listener.opener.open(frame)


def test_a_relay_cannot_leave_a_frame_out() -> None:
    client, listener = relayed()
    sent(client, b"first")

    with pytest.raises(AuthenticationFailed):
        listener.opener.open(sent(client, b"second"))


def test_a_relay_cannot_send_a_frame_back_to_who_sent_it() -> None:
    client, listener = relayed()
    for session in (client, listener):
        with pytest.raises(AuthenticationFailed):
            session.opener.open(sent(session, b"a command"))


def test_a_frame_of_one_session_means_nothing_in_another_of_the_same_two() -> None:
    client, _ = relayed()
    _, later = run(dialler(identity("n1", role="client"), nonce=b"e" * 32), accepter())

    with pytest.raises(AuthenticationFailed):
        later.opener.open(sent(client, b"a command"))


def test_after_one_bad_frame_the_good_ones_are_refused_too() -> None:
    client, listener = relayed()
    good = sent(client, b"a command")
    with pytest.raises(AuthenticationFailed):
        listener.opener.open(b"bad" + good)

    with pytest.raises(AuthenticationFailed):
        listener.opener.open(good)


def test_the_bytes_of_a_frame_cannot_move_between_it_and_its_mark() -> None:
    opener, sealer = Opener(b"k" * 32), Sealer(b"k" * 32)
    frame = b"".join(sealer.seal([b"a command"]))

    with pytest.raises(AuthenticationFailed):
        opener.open(frame[1:])


# --- What is ours to get right ----------------------------------------------------------------------------------------


def test_a_handshake_that_is_over_takes_nothing_more() -> None:
    dial, accept = dialler(), accepter()
    run(dial, accept)

    for side in (dial, accept):
        with pytest.raises(AssertionError):
            side.receive(b"")


def test_a_handshake_that_failed_takes_nothing_more() -> None:
    dial, accept = dialler(), accepter()
    welcome = joined(accept.receive(joined(dial.start())))
    with pytest.raises(RemoteProtocolError):
        dial.receive(b"garbage")

    with pytest.raises(AssertionError):
        dial.receive(welcome)


def test_a_nonce_of_another_length_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        dialler(nonce=b"short")


def test_a_peer_with_a_short_nonce_is_refused() -> None:
    hello = decode(joined(dialler().start()))

    with pytest.raises(RemoteProtocolError, match="nonce"):
        accepter().receive(encode_bytes(hello._replace(blobs=(b"short",))))
