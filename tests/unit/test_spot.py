"""The spot watcher: notices of both clouds, wrong answers and none, and what it then does with Ray's nodes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from fake_cloud import Answer, FakeCloud, aws_notice, send, serving

from clusterns_ray.launch import preemption as spot
from clusterns_ray.launch.preemption import Aws, Gcp, MetadataError, Notice


@pytest.fixture
def cloud() -> Iterator[Callable[..., FakeCloud]]:
    with serving() as start:
        yield start


# ---- the two clouds -------------------------------------------------------------------------------------------------


def test_aws_without_a_notice_keeps_its_token(cloud: Callable[..., FakeCloud]) -> None:
    fake = cloud("aws", (404, ""))
    aws = Aws(fake.endpoint)
    assert aws.notice() is None and aws.notice() is None
    assert fake.asked == ["PUT /latest/api/token", *["GET /latest/meta-data/spot/instance-action"] * 2]


def test_aws_token_that_is_too_old_is_renewed(cloud: Callable[..., FakeCloud]) -> None:
    fake = cloud("aws", (404, ""))
    aws = Aws(fake.endpoint)
    assert aws.notice() is None
    fake.tokens.append("another")
    assert aws.notice() is None
    assert len(fake.tokens) == 3 and aws.token == fake.tokens[-1]


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_aws_notice_and_its_time(cloud: Callable[..., FakeCloud], action: str) -> None:
    notice = Aws(cloud("aws", aws_notice(100, action)).endpoint).notice()
    assert notice is not None and action in notice.text
    assert notice.deadline - time.time() == pytest.approx(100, abs=2)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (aws_notice(-50)[1], 1),  # our clock is ahead
        (aws_notice(5000)[1], 120),  # or behind
        ('{"action": "stop"}', 120),
        ('{"action": "stop", "time": "soon"}', 120),
        ('{"action": "stop", "time": 7}', 120),
    ],
    ids=["past", "far ahead", "none", "a word", "a number"],  # the texts hold the time of day
)
def test_aws_notice_with_a_time_that_cannot_be(cloud: Callable[..., FakeCloud], body: str, left: float) -> None:
    notice = Aws(cloud("aws", (200, body)).endpoint).notice()
    assert notice is not None
    assert notice.deadline - time.time() == pytest.approx(left, abs=1)


def test_gcp_notice(cloud: Callable[..., FakeCloud]) -> None:
    fake = cloud("gcp", (200, "FALSE"))
    gcp = Gcp(fake.endpoint)
    assert gcp.notice() is None
    fake.notice = (200, "TRUE")
    notice = gcp.notice()
    assert notice is not None
    assert notice.deadline - time.time() == pytest.approx(30, abs=1)


WRONG: dict[str, tuple[str, Answer]] = {
    "aws: not json": ("aws", (200, "<html>TRUE</html>")),
    "aws: no action": ("aws", (200, '{"time": "2026-01-01T00:00:00Z"}')),
    "aws: a list": ("aws", (200, '["terminate"]')),
    "aws: server error": ("aws", (500, "")),
    "aws: moved": ("aws", (302, "")),
    "aws: refuses its token": ("aws", (401, "")),
    "gcp: neither": ("gcp", (200, "MAYBE")),
    "gcp: not there": ("gcp", (404, "")),
    "gcp: somebody else": ("gcp", lambda handler: send(handler, 200, "TRUE")),
    "gcp: hangs up": ("gcp", lambda handler: handler.connection.close()),
    "gcp: no http": ("gcp", lambda handler: handler.wfile.write(b"TRUE\r\n\r\n") and None),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_answers_are_no_notice(cloud: Callable[..., FakeCloud], what: str) -> None:
    kind, answer = WRONG[what]
    with pytest.raises(MetadataError):
        spot.CLOUDS[kind](cloud(kind, answer).endpoint).notice()


def test_nothing_listens(cloud: Callable[..., FakeCloud]) -> None:
    with pytest.raises(MetadataError, match="gives no answer"):
        Aws("http://127.0.0.1:1").notice()


def silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(3)


def dripping(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nMetadata-Flavor: Google\r\nContent-Length: 4000\r\n\r\n")
    for _ in range(60):
        handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [silent, dripping])
def test_every_request_has_a_deadline(
    cloud: Callable[..., FakeCloud], monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    fake = cloud("gcp", answer)
    began = time.monotonic()
    with pytest.raises(MetadataError):
        spot.request(fake.endpoint, "GET", "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}, 0.3)
    assert time.monotonic() - began < 1.5


def test_a_proxy_is_not_asked(cloud: Callable[..., FakeCloud], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert Aws(cloud("aws", (404, "")).endpoint).notice() is None


# ---- which cloud, and when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "quiet"), [("aws", (404, "")), ("gcp", (200, "FALSE"))])
def test_the_cloud_that_answers_is_found(cloud: Callable[..., FakeCloud], kind: str, quiet: Answer) -> None:
    assert spot.find_metadata("auto", cloud(kind, quiet).endpoint).name == kind


def test_on_no_cloud_it_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(spot, "FIND_TIMEOUT_S", 0.05)
    assert spot.main(["--endpoint", "http://127.0.0.1:1", "--poll", "0.02"]) == 1
    assert "No cloud's metadata service" in caplog.text


def test_trouble_is_passed_over_and_said_once(
    cloud: Callable[..., FakeCloud], caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Answer] = [(404, ""), (500, ""), (500, ""), (200, "nonsense"), (404, ""), aws_notice(60)]
    fake = cloud("aws", (404, ""))
    aws = Aws(fake.endpoint)
    plain = aws.notice

    def notice() -> Notice | None:
        fake.notice = answers.pop(0)
        return plain()

    aws.notice = notice  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO, "spot"):
        assert "terminate" in spot.wait_for_notice(aws, poll_s=0.001).text
    assert not answers
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3, said
    assert "500" in said[0] and "nonsense" in said[1] and "answers again" in said[2]


# ---- draining -------------------------------------------------------------------------------------------------------


def soon(seconds: float = 30.0) -> Notice:
    return Notice(time.time() + seconds, "test")


def test_every_node_of_the_machine_is_drained_until_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot, "DRAIN_RETRY_S", 0.001)
    calls: list[tuple[str, str]] = []

    def drain(node: str, address: str, notice: Notice) -> None:
        calls.append((node, address))
        if node == "b" and len(calls) < 4:
            raise RuntimeError("not yet")

    nodes = {"a": "host:1", "b": "host:2"}
    assert sorted(spot.drain_machine(soon(), nodes=lambda: nodes, drain=drain)) == ["a", "b"]
    assert calls == [("a", "host:1"), ("b", "host:2"), ("b", "host:2"), ("b", "host:2")]


def test_one_node_alone() -> None:
    calls: list[str] = []
    nodes = {"a": "host:1", "b": "host:1"}
    assert spot.drain_machine(soon(), "b", nodes=lambda: nodes, drain=lambda node, *_: calls.append(node)) == ["b"]
    assert calls == ["b"]


def test_a_node_that_starts_late_is_drained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot, "DRAIN_RETRY_S", 0.001)
    looks = [{}, {}, {"a": "host:1"}]
    assert spot.drain_machine(soon(), nodes=lambda: looks.pop(0), drain=lambda *_: None) == ["a"]


def test_draining_gives_up_when_the_machine_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot, "DRAIN_RETRY_S", 0.01)

    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    assert spot.drain_machine(soon(0.05), nodes=lambda: {"a": "host:1"}, drain=refuse) == []
    assert spot.drain_machine(soon(0.05), nodes=dict, drain=refuse) == []


def test_waiting_for_the_work_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot, "DRAIN_RETRY_S", 0.001)
    looks = [{"a": "x"}, {"a": "x"}, {"b": "x"}]
    assert spot.wait_until_gone(["a"], time.time() + 5, lambda: looks.pop(0)) and not looks
    assert not spot.wait_until_gone(["a"], time.time() + 0.02, lambda: {"a": "x"})


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def drains(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Notice]]:
    """In place of Ray: a node, which ends as soon as it is drained."""
    calls: list[tuple[str, Notice]] = []
    nodes = {"abc": "host:6379"}

    def drain_machine(notice: Notice, only: str | None = None) -> list[str]:
        found = [node for node in nodes if only in (None, node)]
        calls.extend((node, notice) for node in found)
        nodes.clear()
        return found

    monkeypatch.setattr(spot, "drain_machine", drain_machine)
    monkeypatch.setattr(spot, "nodes_here", lambda: dict(nodes))
    monkeypatch.setattr(spot.wait_until_gone, "__defaults__", (lambda: dict(nodes),))
    return calls


def test_it_watches_until_there_is_a_notice(cloud: Callable[..., FakeCloud], drains: list[tuple[str, Notice]]) -> None:
    fake = cloud("gcp", (200, "FALSE"))
    ended: list[int] = []
    arguments = ["--provider", "gcp", "--endpoint", fake.endpoint, "--poll", "0.01"]
    thread = threading.Thread(target=lambda: ended.append(spot.main(arguments)), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while len(fake.asked) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not drains and thread.is_alive()
    fake.notice = (200, "TRUE")
    thread.join(20)
    assert ended == [0]
    ((node, notice),) = drains
    assert node == "abc" and notice.deadline - time.time() == pytest.approx(30, abs=3)


def test_it_says_when_nothing_could_be_drained(
    cloud: Callable[..., FakeCloud], drains: list[tuple[str, Notice]], caplog: pytest.LogCaptureFixture
) -> None:
    fake = cloud("aws", aws_notice(20))
    assert spot.main(["--provider", "aws", "--endpoint", fake.endpoint, "--node-id", "other"]) == 1
    assert not drains and "could be drained" in caplog.text


def test_drain_now(drains: list[tuple[str, Notice]]) -> None:
    assert spot.main(["--drain-now", "50"]) == 0
    ((node, notice),) = drains
    assert node == "abc" and notice.deadline - time.time() == pytest.approx(50, abs=3)
    assert spot.main(["--drain-now", "50"]) == 0, "no node is left, which is as well"
    assert len(drains) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--provider", "azure"], ["--poll", "0"], ["--poll", "nan"], ["--drain-now", "-1"], ["--endpoint", "10.0.0.1"]],
)
def test_wrong_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        spot.main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
