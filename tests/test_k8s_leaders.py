"""LLMInference objects and their leader pods, followed through whatever an API server may do."""

from __future__ import annotations

import threading
import time

import pytest

kubernetes = pytest.importorskip("kubernetes", reason="the k8s extra is not installed")

from fake_kube import FakeKube  # noqa: E402
from waiting import wait_until  # noqa: E402

from lightvllm.backends.k8s import labels  # noqa: E402
from lightvllm.backends.k8s.leaders import Inference, Leader, Leaders, LeaderWatch  # noqa: E402
from lightvllm.errors import ConfigError  # noqa: E402


@pytest.fixture
def kube():
    server = FakeKube()
    yield server
    server.close()


class Seen(list):
    """The states that were called back with."""

    @property
    def models(self) -> list[str]:
        return [inference.model for inference in self[-1].inferences] if self else []

    @property
    def leaders(self) -> dict[str, Leader]:
        return {leader.name: leader for leader in self[-1].leaders} if self else {}


@pytest.fixture
def follow(kube, tmp_path):
    """A function that starts a watch and gives what it tells."""
    watches = []

    def start(**options) -> Seen:
        seen = Seen()
        options = {"watch_seconds": 5, "grace_seconds": 5.0, "first_pause": 0.01, "namespace": "ns"} | options
        watch = LeaderWatch(seen.append, kubeconfig=kube.kubeconfig(tmp_path), **options)
        watches.append(watch)
        watch.start()
        return seen

    yield start
    for watch in watches:
        began = time.monotonic()
        watch.close()
        watch.close()
        assert time.monotonic() - began < 3, "a watch that waits is cut"
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("lightvllm k8s")]


def test_objects_and_pods_are_listed_and_watched(kube, follow):
    kube.inference("llama", model="org/llama", servedModelName="llama")
    kube.inference("empty", model="idle")
    kube.inference("broken")
    kube.leader("llama-0", "llama", "10.0.0.1", port=9000)
    kube.leader("llama-1", "llama", "fd00::1", port=None, ready=False)
    kube.leader("llama-2", "llama", address=None)
    kube.leader("stray", "deleted long ago")
    seen = follow()
    wait_until(lambda: seen, "both are listed")
    assert seen[0] == Leaders(
        (Inference("ns", "empty", "idle"), Inference("ns", "llama", "llama")),
        (
            Leader("ns", "llama-0", "llama", "10.0.0.1", 9000, True),
            Leader("ns", "llama-1", "llama", "fd00::1", labels.HTTP_PORT, False),
        ),
    )
    kube.leader("llama-1", "llama", "fd00::1")
    wait_until(lambda: seen.leaders["llama-1"].ready, "it is ready")
    kube.leader("llama-0", "llama", deletionTimestamp="2026-01-01T00:00:00Z")
    wait_until(lambda: not seen.leaders["llama-0"].ready, "it is being deleted")
    kube.delete("pods", "llama-0")
    wait_until(lambda: set(seen.leaders) == {"llama-1"}, "it is gone")
    kube.delete(labels.PLURAL, "llama")
    wait_until(lambda: seen.models == ["idle"] and not seen.leaders, "the object and its leaders are gone")
    assert len(kube.lists) == 2, "all of that was told by the watches"
    assert kube.tokens == {"Bearer secret"}


def test_what_is_asked(kube, follow):
    kube.inference("a", namespace="other", model="m")
    seen = follow(namespace=None, selector="team=a")
    wait_until(lambda: seen.models == ["m"], "all namespaces")
    queries = dict(kube.watches)
    assert queries["pods"]["labelSelector"] == "lightvllm.io/llminference,lightvllm.io/role=leader"
    assert queries[labels.PLURAL]["labelSelector"] == "team=a"
    assert queries["pods"]["allowWatchBookmarks"].lower() == "true"
    only = follow(namespace="ns")
    wait_until(lambda: only, "listed")
    assert only.models == []


def test_long_lists_come_in_pages(kube, follow):
    kube.page = 2
    for number in range(5):
        kube.inference(f"i{number}", model=f"m{number}")
    seen = follow()
    wait_until(lambda: len(seen.models) == 5, "all pages")


@pytest.mark.parametrize("as_status", [False, True])
def test_an_expired_version_lists_anew(kube, follow, as_status):
    kube.inference("a", model="m")
    seen = follow(watch_seconds=1)
    wait_until(lambda: seen.models == ["m"], "listed")
    kube.forget(labels.PLURAL, "a")
    kube.expire(as_status=as_status)
    wait_until(lambda: seen.models == [], "listed anew")
    kube.inference("b", model="n")
    wait_until(lambda: seen.models == ["n"], "watched again")


def test_watches_that_end_go_on_without_a_list(kube, follow):
    seen = follow(watch_seconds=1)
    wait_until(lambda: len(kube.watches) >= 4, "watches that followed others")
    kube.inference("a", model="m")
    wait_until(lambda: seen.models == ["m"], "told")
    assert len(kube.lists) == 2


def test_a_silent_connection_is_given_up(kube, follow):
    """Half open: nothing comes any more, not even the end that was asked for."""
    kube.silent = True
    seen = follow(watch_seconds=1, grace_seconds=0.2)
    wait_until(lambda: len(kube.watches) >= 2, "both watch")
    kube.inference("a", model="m")
    wait_until(lambda: seen.models == ["m"], "listed anew after the silence")


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_errors_are_told_and_tried_again_with_a_back_off(kube, follow, status, caplog):
    kube.inference("a", model="m")
    kube.fail = status
    seen = follow()
    wait_until(lambda: len(kube.lists) >= 6, "tried again")
    assert f"the API server says {status}" in caplog.text
    assert seen == [], "nothing is said before all is known"
    kube.fail = None
    wait_until(lambda: seen.models == ["m"], "listed")


def test_what_was_known_stays_while_the_server_is_away(kube, follow):
    kube.inference("a", model="m")
    seen = follow(watch_seconds=1)
    wait_until(lambda: seen.models == ["m"], "listed")
    kube.fail, kube.garbage = 500, True
    before = len(kube.lists)
    wait_until(lambda: len(kube.lists) >= before + 3, "tried again")
    assert seen.models == ["m"]


def test_a_line_that_is_no_json_lists_anew(kube, follow):
    seen = follow(watch_seconds=1)
    wait_until(lambda: seen, "listed")
    before = len(kube.lists)
    kube.garbage = True
    wait_until(lambda: len(kube.lists) > before, "listed anew")


def test_a_resync_finds_what_watches_have_lost(kube, follow):
    kube.inference("a", model="m")
    seen = follow(watch_seconds=1, resync_seconds=0.1)
    wait_until(lambda: seen.models == ["m"], "listed")
    kube.forget(labels.PLURAL, "a")
    wait_until(lambda: seen.models == [], "listed anew")


def test_without_an_api_server_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match=r"no Kubernetes API server: .*give --kubeconfig"):
        LeaderWatch(print, kubeconfig=tmp_path / "none")
    (tmp_path / "bad").write_text("clusters: 5")
    with pytest.raises(ConfigError, match="no Kubernetes API server"):
        LeaderWatch(print, kubeconfig=tmp_path / "bad")


def test_a_server_that_ends_everything_at_once_is_asked_with_pauses(kube, follow):
    kube.inference("a", model="m")
    seen = follow(watch_seconds=0, first_pause=0.2)
    wait_until(lambda: seen.models == ["m"], "listed")
    before = len(kube.watches)
    began = time.monotonic()
    wait_until(lambda: len(kube.watches) >= before + 4, "watched again")
    assert time.monotonic() - began > 0.15
    kube.expire(as_status=True)
    kube.gone_before = 10**9  # every version is too old
    before, began = len(kube.lists), time.monotonic()
    wait_until(lambda: len(kube.lists) >= before + 6, "listed again and again")
    assert time.monotonic() - began > 0.15
