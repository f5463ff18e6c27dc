"""The judge against a server of our own: both orders, retries, cache, malformed answers, and a key that leaves no trace."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from commands.judge import REMINDER, Judge, JudgeSettings, Question, Verdict, read_verdict
from utils import UserError


class Server:
    """Answers chat completions with ``answer(body)``: text, an HTTP status with headers and bytes, None to hang up, or the
    bytes of a whole HTTP answer."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.answer, self.bodies, self.headers, self.paths = answer, [], [], []
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.bodies.append(body)
                    owner.headers.append(dict(self.headers))
                    owner.paths.append(self.path)
                    found = owner.answer(body)
                if isinstance(found, str):
                    found = (200, {}, json.dumps({"choices": [{"message": {"content": found}}]}).encode())
                if found is None or isinstance(found, bytes):
                    self.wfile.write(found or b"")
                    self.close_connection = True
                    return
                status, headers, content = found
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Any]) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()


def responses(body: dict[str, Any]) -> tuple[str, str]:
    """(Response A, Response B) of a request."""
    text = body["messages"][1]["content"]
    return tuple(re.search(rf"Response {x}:\n(.*?)\n\n", text, re.DOTALL)[1] for x in "AB")


def longer(body: dict[str, Any]) -> str:
    first, second = responses(body)
    return "[[tie]]" if len(first) == len(second) else "[[A]]" if len(first) > len(second) else "so [[B]]"


def judge_of(server: Server, tmp_path: Path, **how: Any) -> tuple[Judge, list[float]]:
    pauses: list[float] = []
    settings = JudgeSettings(url=server.url, model="m", **{"workers": 2, "retries": 2, **how})
    return Judge(settings, tmp_path / "cache", sleep=pauses.append), pauses


QUESTIONS = [Question("P", "long answer", "no"), Question("P", "no", "long answer"), Question("Q", "ab", "cd"), Question("Q", "x", "x")]  # fmt: skip


def test_every_pair_is_asked_in_both_orders(tmp_path):
    with serving(longer) as server:
        judge, _ = judge_of(server, tmp_path)
        verdicts = judge(QUESTIONS)
    assert [v.p for v in verdicts] == [1.0, 0.0, 0.5, 0.5]
    assert set(server.paths) == {"/v1/chat/completions"}
    assert {responses(b) for b in server.bodies} == {("long answer", "no"), ("no", "long answer"), ("ab", "cd"), ("cd", "ab")}  # fmt: skip
    assert {b["model"] for b in server.bodies} == {"m"} and {b["temperature"] for b in server.bodies} == {0.0}


def test_a_judge_that_looks_at_positions_alone_says_nothing(tmp_path):
    with serving(lambda body: "[[A]]") as server:
        judge, _ = judge_of(server, tmp_path)
        assert judge(QUESTIONS[:2]) == [Verdict(1.0, 0.0)] * 2
    assert judge(QUESTIONS[:1])[0].p == 0.5


def test_answers_are_kept_on_disk_by_content(tmp_path):
    with serving(longer) as server:
        judge, _ = judge_of(server, tmp_path)
        first = judge(QUESTIONS)
        asked = len(server.bodies)
        assert judge(QUESTIONS) == first and len(server.bodies) == asked
    (file,) = (tmp_path / "cache").iterdir()
    again = Judge(judge.settings, tmp_path / "cache")  # the server is gone
    assert again(QUESTIONS) == first and again.counts["asked"] == 0
    other = Judge(JudgeSettings(url=server.url, model="m", temperature=0.5, retries=0), tmp_path / "cache")
    with pytest.raises(UserError, match="no answer after 1 attempts"):
        other(QUESTIONS[:1])
    file.write_bytes(file.read_bytes()[:-7])  # killed in the middle of a line
    with serving(longer) as server:
        torn = Judge(JudgeSettings(url=server.url, model="m"), tmp_path / "cache")
        assert len(torn._answers) == 0  # another url is another judge
        torn._path = file
        torn._answers = torn._read_cache()
        assert torn(QUESTIONS) == first and len(server.bodies) == 1
    assert len(Judge(judge.settings, tmp_path / "cache")._answers) == 4


def test_failures_are_tried_again_with_growing_pauses(tmp_path):
    script = [
        (429, {"Retry-After": "7"}, b"slow down"),
        (503, {}, b""),
        "[[A]]",
        (200, {}, b"<html>"),
        None,
        "[[B]]",
    ]
    with serving(lambda body: script.pop(0)) as server:
        judge, pauses = judge_of(server, tmp_path, workers=1)
        assert judge(QUESTIONS[:1])[0].p == 1.0
    assert judge.counts["retried"] == 4 and judge.counts["asked"] == 6
    low, high = 0.5, 1.5  # spread
    for pause, base in zip(pauses, (7.0, 2.0, 1.0, 2.0), strict=True):
        assert low * base <= pause <= high * base


@pytest.mark.parametrize(
    "answer",
    [
        b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"cho',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\n{",
        b"HTTP/1.1 503 Down\r\nContent-Length: 500\r\n\r\nx",
        b"what?\r\n\r\n",
    ],
    ids=["answer", "chunk", "error", "head"],
)
def test_a_connection_lost_in_the_middle_is_tried_again(tmp_path, answer):
    script = [answer, "[[A]]", "[[B]]"]
    with serving(lambda body: script.pop(0)) as server:
        judge, _ = judge_of(server, tmp_path, workers=1)
        assert judge(QUESTIONS[:1]) == [Verdict(1.0, 1.0)]
    assert judge.counts["retried"] == 1


def test_giving_up_says_what_happened_and_keeps_what_was_answered(tmp_path):
    def fails_for_no(body: dict[str, Any]) -> Any:
        return (500, {}, b"out of order") if "no" in responses(body) else "[[A]]"

    with serving(fails_for_no) as server:
        judge, pauses = judge_of(server, tmp_path, workers=1)
        with pytest.raises(
            UserError, match=r"no answer after 3 attempts \(HTTP 500: out of order\); the same command cont"
        ):
            judge([QUESTIONS[2], QUESTIONS[0]])
    assert len(pauses) == 2
    assert len(Judge(judge.settings, tmp_path / "cache")._answers) == 2


def test_a_refused_key_is_told_at_once_and_never_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with serving(lambda body: (401, {}, b"bad key")) as server:
        judge, pauses = judge_of(server, tmp_path, key_env="MY_KEY", workers=1)
        with pytest.raises(UserError, match=r"HTTP 401: bad key; is \$MY_KEY set") as caught:
            judge(QUESTIONS[:1])
    assert pauses == [] and server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    with serving(longer) as server:
        judge, _ = judge_of(server, tmp_path, key_env="MY_KEY")
        judge(QUESTIONS)
        judge.log()
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"sk-very-secret" not in written + caplog.text.encode() + str(caught.value).encode()
    monkeypatch.delenv("MY_KEY")
    with serving(longer) as server:
        judge_of(server, tmp_path / "other", key_env="MY_KEY")[0](QUESTIONS[:1])
        assert "Authorization" not in server.headers[0]


def test_an_answer_that_cannot_be_read_is_asked_for_once_more_and_counted(tmp_path):
    def answer(body: dict[str, Any]) -> str:
        if responses(body)[0] == "no":
            return "I cannot say"
        return "[[A]]" if body["messages"][-1]["content"] == REMINDER else "the first, I think"

    with serving(answer) as server:
        judge, _ = judge_of(server, tmp_path, workers=1)
        (verdict,) = judge(QUESTIONS[:1])
    assert verdict == Verdict(1.0, None) and verdict.p is None
    assert judge.counts["malformed"] == 3 and judge.counts["unread"] == 1 and len(server.bodies) == 4
    assert server.bodies[1]["messages"][2] == {"role": "assistant", "content": "the first, I think"}


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("[[A]]", 1.0), ("[[b]]", 0.0), ("[[ tie ]]", 0.5), ("[[C]]", 0.5), ("First [[A]], but then [[B]].", 0.0),
        ("A", 1.0), (" B.", 0.0), ("**tie**", 0.5), ("[A]", 1.0), ("A is better", None), ("", None), ("[[AB]]", None),
    ],
)  # fmt: skip
def test_reading_answers(answer, score):
    assert read_verdict(answer) == score


def test_texts_with_braces_and_chats_stay_what_they_are(tmp_path):
    chat = ({"role": "user", "content": "Hi {first}"}, {"role": "assistant", "content": "Yes?"})
    with serving(lambda body: "[[A]]") as server:
        judge, _ = judge_of(server, tmp_path, workers=1)
        judge([Question(chat, ({"role": "assistant", "content": "{second}"},), "{prompt}")])
    assert responses(server.bodies[0]) == ("{second}", "{prompt}")
    assert "user: Hi {first}\n\nassistant: Yes?" in server.bodies[0]["messages"][1]["content"]


def test_a_template_of_ones_own(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("Response A:\n{first}\n\nResponse B:\n{second}\n\nto {prompt}")
    with serving(longer) as server:
        judge_of(server, tmp_path, template=str(path))[0](QUESTIONS[:1])
    assert server.bodies[0]["messages"][1]["content"].endswith("to P")
    path.write_text("{first} {second}")
    with pytest.raises(UserError, match=r"has no \{prompt\}"):
        judge_of(server, tmp_path, template=str(path))
    with pytest.raises(UserError, match="no such file"):
        judge_of(server, tmp_path, template="nowhere.txt")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"url": "example.org"}, "must be http"),
        ({"url": "http://"}, "and a host"),
        ({"url": "http://my host/v1"}, "and a host"),
        ({"url": "http://[::1/v1"}, "and a host"),
        ({"workers": 0}, "workers=0"),
        ({"timeout_s": 0.0}, "timeout_s=0"),
    ],
)
def test_wrong_settings_are_user_errors(how, message):
    with pytest.raises(UserError, match=message):
        JudgeSettings(**{"url": "http://x", "model": "m", **how})
