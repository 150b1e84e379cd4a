"""`doctor` beside real nodes: it names those that it hears, and says what is wrong with those that it does not."""

from __future__ import annotations

import socket
from pathlib import Path

from harness import Site, wait_for


def key(site: Site, name: str, text: str) -> str:
    path = Path(site.folder / name)
    path.write_text(text + "\n")
    path.chmod(0o600)
    return str(path)


def test_a_node_that_runs_is_named_and_the_port_is_its_own(site: Site) -> None:
    site.hands()
    done = site.do("doctor", "--seed", f"127.0.0.1:{site.port}")
    assert done.code == 0, done.out + done.err
    (heard,) = [line for line in done.lines if line.startswith("heard: ")]
    assert f"127.0.0.1:{site.port} (the node of this home)" in heard
    assert "leads, term 1; the key fits" in heard
    assert f"TCP port {site.port}: held by node " in done.out
    assert f"a node runs there, at 127.0.0.1:{site.port}" in done.out
    assert f"seed 127.0.0.1:{site.port}: takes TCP connections" in done.out
    assert "trouble" not in done.out
    assert "the key of a test" not in done.out


def test_another_key_is_said_with_what_to_do_and_founds_nothing(site: Site) -> None:
    site.hands()
    done = site.do("doctor", P2PCLUSTER_HOME=str(site.folder / "other"), P2PCLUSTER_AUTHKEY_FILE=key(site, "otherkey", "another key"))
    assert done.code == 1
    assert "another key" in done.out
    (trouble,) = [line for line in done.lines if line.startswith("trouble: ")]
    assert "holds another key of cluster 'default'" in trouble
    assert "key --set" in trouble
    assert not (site.folder / "other").exists(), "it makes no home"


def test_without_a_key_it_says_that_others_have_one(site: Site) -> None:
    site.hands()
    done = site.do("doctor", P2PCLUSTER_HOME=str(site.folder / "other"), P2PCLUSTER_AUTHKEY_FILE=str(site.folder / "nokey"))
    assert done.code == 1
    assert "there is none yet" in done.out
    assert "this node holds none" in done.out
    assert not (site.folder / "nokey").exists(), "it makes no key"


def test_a_node_that_waits_to_found_its_cluster_is_not_held_up_by_another_key(site: Site) -> None:
    node = site.start("run", "--expect", "2")
    node.wait_for_line("waiting for 1 more node")
    done = site.do("doctor", P2PCLUSTER_HOME=str(site.folder / "other"), P2PCLUSTER_AUTHKEY_FILE=key(site, "otherkey", "another key"))
    assert done.code == 1
    assert "would hold up" in done.out
    site.start("run", P2PCLUSTER_HOME=str(site.folder / "second"))
    wait_for(lambda: any(" leads " in line or " follows " in line for line in node.lines), "the cluster is founded")
    assert not any("under another key" in line for line in node.lines)


def test_nobody_there_is_no_trouble_and_a_stranger_on_the_port_is_told(site: Site) -> None:
    with socket.create_server(("127.0.0.1", site.port)):
        done = site.do("doctor")
    assert done.code == 0, done.out
    assert f"TCP port {site.port}: held by another program" in done.out
    assert "hint: no node was heard" in done.out


def test_a_seed_where_nobody_listens_is_trouble(site: Site) -> None:
    done = site.do("doctor", "--seed", "127.0.0.1:9")
    assert done.code == 1
    assert "trouble: seed 127.0.0.1:9 cannot be reached by TCP" in done.out
