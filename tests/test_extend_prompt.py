"""`--extend-prompt`: what a language model is asked, and that the prompt stays as it is whatever goes wrong."""

import base64
import contextlib
import http.server
import io
import json
import threading

import numpy as np
import PIL.Image
import pytest
from tiny import DIFFUSERS, flags

import sample_jax
from wanjax.errors import InputError
from wanjax.sampling.extend_prompt import KEY, checked, make_extend

WORDS = " ".join(["A bird opens its wings."] * 18)


class Endpoint(http.server.BaseHTTPRequestHandler):
    """A server that answers as it is told, and keeps what it was asked."""

    def do_GET(self):
        self.reply({"data": [{"id": "the-first"}, {"id": "another"}]})

    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers.get("Authorization"))
        self.reply(self.server.answer)

    def reply(self, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def endpoint(content=WORDS, status=200, answer=None):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.asked, server.keys, server.status = [], [], status
    server.answer = answer or {"choices": [{"message": {"content": content}}]}
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def picture(colour, size=(64, 32)):
    return PIL.Image.new("RGB", size, colour)


def test_both_pictures_and_the_prompt_are_sent(monkeypatch):
    """In order, made small, with the template; by the key of the environment, to the first model listed."""
    monkeypatch.setenv(KEY, "secret")
    with endpoint(f"<think>hm</think>\n{WORDS}") as server:
        prompt, note = make_extend(server.url)("a bird", [picture("red", (3000, 1500)), picture("blue")])
    assert (prompt, note) == (WORDS, None)
    (asked,) = server.asked
    assert asked["model"] == "the-first"
    assert server.keys == ["Bearer secret"]
    system, user = asked["messages"]
    assert "80 to 100 words" in system["content"]
    assert "becomes the other" in system["content"]
    first, last, text = user["content"]
    assert "a bird" in text["text"]
    colours = []
    for part in (first, last):
        sent = PIL.Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
        assert max(sent.size) <= 768
        colours.append(np.asarray(sent).mean((0, 1)).round(-2).tolist())
    assert colours == [[300.0, 0.0, 0.0], [0.0, 0.0, 300.0]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": 500},
        {"answer": b"no JSON"},
        {"answer": {"error": "no such model"}},
        {"answer": {"choices": []}},
        {"content": None},
        {"content": "I cannot help."},
        {"content": "word " * 1000},
    ],
)
def test_a_failure_leaves_the_prompt_as_it_is(wrong):
    with endpoint(**wrong) as server:
        prompt, note = make_extend(server.url, "m")("a bird", [picture("red")])
    assert prompt == "a bird"
    assert note.startswith("note: the prompt is as given")
    assert "\n" not in note


def test_nobody_there():
    with endpoint() as server:
        pass
    prompt, note = make_extend(server.url)("a bird", [])
    assert prompt == "a bird"
    assert "as given" in note


def test_an_address_that_is_none():
    for url in ("localhost:8000", "ftp://x/v1", "http://"):
        with pytest.raises(InputError, match="--extend-prompt"):
            make_extend(url)


def test_quotes_and_line_breaks_go():
    assert checked(f'"{WORDS}\n\n{WORDS[:9]}"') == f"{WORDS} {WORDS[:9]}"


def test_command_line(tmp_path, capsys, monkeypatch):
    """`wanjax sample` asks before the work and samples with the answer; who is asked is not asked again."""
    seen = []

    def run(self, request, **_):
        seen.append(request)
        raise InputError("enough")

    monkeypatch.setattr("wanjax.sampling.pipeline.Pipeline.__call__", run)
    with endpoint() as server, pytest.raises(InputError, match="enough"):
        sample_jax.main([*flags(DIFFUSERS, output=tmp_path / "v.npy"), "--extend-prompt", server.url])
    assert len(server.asked[0]["messages"][1]["content"]) == 3
    assert seen[0].config.prompt == WORDS
    assert seen[0].config.extend_prompt is None
    assert f"prompt, written out: {WORDS}" in capsys.readouterr().err
