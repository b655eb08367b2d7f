"""`/v1/videos`: requests, refusals, the queue, cancelling."""

import base64
import contextlib
import json
import shutil

import av
import pytest
import safetensors.numpy
from fastapi.testclient import TestClient
from server_clients import FILES, FIRST, LAST, over, until
from tiny import normal
from tiny_server import QuickPipeline

from wanjax import demo
from wanjax.commands.serve import make_server
from wanjax.config.serving import ServeConfig
from wanjax.errors import InputError
from wanjax.sampling import recorded
from wanjax.serving import api
from wanjax.serving.jobs import Jobs
from wanjax.serving.warm import make_warm, sizes
from wanjax.serving.worker import Worker


@pytest.fixture(scope="module")
def pipe():
    return QuickPipeline(demo.get_config(), keep="one")


@contextlib.contextmanager
def serving(pipe, folder, pause=0.0, **limits):
    """A client of a server in this process."""
    pipe.pause = pause
    jobs = Jobs(folder, limits.get("max_queue", 100))
    worker = Worker(pipe, jobs, most_kept=limits.get("max_kept", 1000))
    with TestClient(make_server(ServeConfig(**limits), demo.get_config(), worker).app) as client:
        client.worker = worker
        yield client
    jobs.close()


@pytest.fixture
def client(pipe, tmp_path):
    with serving(pipe, tmp_path) as client:
        yield client


@pytest.fixture
def slow(pipe, tmp_path):
    """A server whose jobs do not end by themselves: 100 steps of a second."""
    with serving(pipe, tmp_path, pause=1.0, max_queue=2) as client:
        yield client


def assert_within_a_step(job):
    """The step that a job was in when it was cancelled is its last."""
    steps = job["timings"]
    assert steps["steps when cancelled"] <= steps["steps"] <= steps["steps when cancelled"] + 1


def data_url(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def frame_image(kind, data=FIRST, **more):
    return {"type": "image_url", "image_url": {"url": data_url(data)}, "frame_type": kind, **more}


# ------------------------------------------------------------------------------------------------------------- requests


def test_form_and_json_make_the_same_video(client):
    """Own names and those of the field, pictures as files and inside of JSON; settings are found in the video again."""
    form = client.post(
        "/v1/videos",
        data={"prompt": "a b", "num_inference_steps": "3", "guidance": "1,1,1", "fast": "true"},
        files=FILES,
    )
    body = {"prompt": "a b", "steps": 3, "guidance_scale": [1, 1, 1], "fast": True, "model": "demo", "size": None}
    body["frame_images"] = [frame_image("first_frame"), frame_image("last_frame", LAST)]
    jobs = [over(client, x.raise_for_status().json()["id"]) for x in (form, client.post("/v1/videos", json=body))]
    contents = [client.get(f"/v1/videos/{job['id']}/content") for job in jobs]
    assert contents[0].content == contents[1].content
    assert contents[0].headers["content-type"] == "video/mp4"
    assert jobs[0]["settings"] == jobs[1]["settings"]
    assert jobs[0]["settings"]["steps"] == 3
    assert (jobs[0]["size"], jobs[0]["progress"], jobs[0]["runs"]) == ("64x64", 100, 1)
    path = client.worker.jobs.video(jobs[0]["id"])
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 17
    settings, loras = recorded.read(path)
    assert loras == ()
    assert {k: v for k, v in settings.items() if v is not None} == {"prompt": "a b", **jobs[0]["settings"]}


def test_sync_size_seconds_keyframes_and_ranges(client):
    """The video at once; a part of it, as players ask for it."""
    found = client.post(
        "/v1/videos/sync",
        data={"size": "32x48", "seconds": "0.5", "keyframe_at": "50%"},
        files=[("input_reference", FIRST), ("keyframe", LAST)],
    )
    assert found.status_code == 200, found.text
    job = client.get(f"/v1/videos/{found.headers['x-video-id']}").json()
    assert (job["size"], job["settings"]["frames"]) == ("32x48", 9)
    part = client.get(f"/v1/videos/{job['id']}/content", headers={"Range": "bytes=0-99"})
    assert (part.status_code, part.content) == (206, found.content[:100])


REFUSED = {
    "unknown": ({"colour": "red"}, 400, ["'colour'", "accepted: "]),
    "range": ({"steps": 0}, 400, ["steps 0", "from 1"]),
    "kind": ({"steps": "many"}, 400, ["steps 'many'", "whole numbers from 1"]),
    "truth": ({"fast": "perhaps"}, 400, ["fast 'perhaps'", "true or false"]),
    "choice": ({"solver": "heun"}, 400, ["solver 'heun'", "unipc, dpmpp"]),
    "limit steps": ({"steps": 101}, 400, ["steps 101", "up to 100"]),
    "limit frames": ({"frames": 801}, 400, ["frames 801", "up to 161"]),
    "limit seconds": ({"seconds": 100}, 400, ["up to 161"]),
    "limit size": ({"size": "4096x4096"}, 400, ["height x width 16777216"]),
    "sigmas past the limit": (
        {"sigmas": [1 - i / 300 for i in range(200)], "frame_images": [frame_image("first_frame")]}, 400,
        ["steps 200", "up to 100"]),
    "size": ({"size": "big"}, 400, ["size 'big'", "WIDTHxHEIGHT"]),
    "size twice": ({"size": "64x64", "width": 64}, 400, ["beside height or width"]),
    "multiple": ({"width": 65, "height": 64, "frame_images": [frame_image("first_frame")]}, 400, ["65"]),
    "two names": ({"steps": 2, "num_inference_steps": 2}, 400, ["another name of steps"]),
    "two lengths": ({"seconds": 1, "frames": 17}, 400, ["in place of frames"]),
    "model": ({"model": "other"}, 400, ["'demo' is served"]),
    "preset": ({"preset": "/etc/passwd"}, 400, ["lightning4"]),
    "path": ({"first_frame": "/etc/passwd"}, 400, ["accepted: "]),
    "noise": ({"initial_noise": "/etc/passwd"}, 400, ["accepted: "]),
    "network": ({"checkpoint": "/"}, 400, ["accepted: "]),
    "lora": ({"lora": ["../../x"]}, 400, ["this server has none"]),
    "prompt": ({"prompt": 5}, 400, ["prompt 5", "text"]),
    "half a character": ({"prompt": "\ud800"}, 400, ["no JSON"]),
    "no list": ({"frame_images": "x"}, 400, ["a list"]),
    "fetch": ({"frame_images": [{"image_url": {"url": "http://x/a.png"}, "frame_type": "first_frame"}]}, 400,
              ["fetches nothing"]),
    "no picture": ({"frame_images": [frame_image("first_frame", b"no")]}, 400, ["not a picture"]),
    "type": ({"frame_images": [frame_image("middle")]}, 400, ["last_frame"]),
    "twice": ({"frame_images": [frame_image("first_frame")] * 2}, 400, ["two pictures for first"]),
    "place": ({"frame_images": [frame_image("keyframe", frame="99s")]}, 400, ["99s"]),
    "frames given": ({"frame_images": [frame_image("last_frame")]}, 400, ["last_frame given", "first_frame"]),
    "extend": ({"extend_prompt": True}, 400, ["no language model"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(client, case):
    """What a request gets wrong is told in one line, in HTTP's words, and becomes no job."""
    body, status, words = REFUSED[case]
    answer = client.post("/v1/videos", content=json.dumps(body), headers={"Content-Type": "application/json"})
    line = answer.json()["error"]["message"]
    assert answer.status_code == status, line
    assert "\n" not in line
    assert "--" not in line
    assert all(word in line for word in words), line
    assert client.get("/v1/videos").json()["data"] == []


def test_bodies_that_are_none(client):
    """Other kinds, broken JSON and forms, and too many bytes, whatever the header says of them."""
    json_header, form_header = {"Content-Type": "application/json"}, {"Content-Type": "multipart/form-data; boundary=x"}
    for content, headers, status in (
        (b"x", {"Content-Type": "text/plain"}, 415),
        (b"{", json_header, 400),
        (b"[]", json_header, 400),
        (b"[" * 200_000, json_header, 400),
        (b'{"steps": ' + b"9" * 5000 + b"}", json_header, 400),
        (b"x", form_header, 400),
        (b"x", {"Content-Type": "multipart/form-data"}, 400),
        (b" " * (33 * 2**20), json_header, 413),
        ((b" " * 2**20 for _ in range(33)), json_header, 413),
    ):
        answer = client.post("/v1/videos", content=content, headers=headers)
        assert answer.status_code == status, answer.text
        assert "\n" not in answer.json()["error"]["message"]
    for files in ({"output": FIRST}, {"keyframe": FIRST}):
        assert client.post("/v1/videos", files=files).status_code == 400
    assert client.post("/v1/videos", data={"first_frame": "/etc/passwd"}).status_code == 400


def test_what_is_not_there(client):
    for method, path, status in (
        ("GET", "/v1/videos/x", 404),
        ("GET", "/v1/videos/x/content", 404),
        ("DELETE", "/v1/videos/x", 404),
        ("GET", "/v1/videos?after=x", 404),
        ("GET", "/v1/videos?limit=0", 422),
        ("GET", "/v2", 404),
        ("PUT", "/v1/videos", 405),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert "\n" not in answer.json()["error"]["message"]


def test_key(client, monkeypatch):
    """With a key in the environment all but health and the schema need it."""
    monkeypatch.setenv(api.KEY, "secret")
    assert client.get("/v1/videos").status_code == 401
    assert client.get("/metrics").status_code == 401
    assert client.get("/v1/videos", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/v1/videos", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/health").status_code == client.get("/openapi.json").status_code == 200


def test_schema_names_every_setting(client):
    """The OpenAPI page has all fields of requests, with their ranges."""
    paths = client.get("/openapi.json").json()["paths"]
    content = paths["/v1/videos"]["post"]["requestBody"]["content"]
    properties = content["application/json"]["schema"]["properties"]
    assert recorded.FIELDS.keys() <= properties.keys()
    assert (properties["steps"]["minimum"], properties["steps"]["maximum"]) == (1, 10_000)
    assert properties["solver"]["enum"] == ["unipc", "dpmpp", "euler", "lcm"]
    assert "format" in content["multipart/form-data"]["schema"]["properties"]["last_frame"]
    assert client.get("/docs").status_code == 200


# ---------------------------------------------------------------------------------------------------------------- queue


def test_queue_cancel_and_delete(slow):
    """A running job ends within a step, a waiting one at once; one over is deleted; a full queue says to come again."""
    ids = [slow.post("/v1/videos", data={"steps": "100"}, files=FILES).json()["id"] for _ in range(1)]
    until(slow, ids[0], lambda job: job["step"])
    preview = slow.get(f"/v1/videos/{ids[0]}/preview")
    assert (preview.status_code, preview.content[8:12]) == (200, b"WEBP")
    ids += [slow.post("/v1/videos", data={"steps": "100"}, files=FILES).json()["id"] for _ in range(2)]
    full = slow.post("/v1/videos", files=FILES)
    assert (full.status_code, full.headers["retry-after"]) == (429, "30")
    running, first, second = (slow.get(f"/v1/videos/{id}").json() for id in ids)
    assert running["status"] == "in_progress"
    assert running["seconds_left"] > 1
    assert (first["queue_position"], second["queue_position"]) == (1, 2)
    assert slow.get(f"/v1/videos/{ids[1]}/content").status_code == 409
    for id in ids[1:] + ids[:1]:
        assert slow.delete(f"/v1/videos/{id}").json()["deleted"]
    ended = [over(slow, id) for id in ids]
    assert [job["status"] for job in ended] == ["cancelled"] * 3
    assert_within_a_step(ended[0])
    assert slow.delete(f"/v1/videos/{ids[0]}").status_code == 200
    assert slow.get(f"/v1/videos/{ids[0]}").status_code == 404
    assert 'wanjax_videos_ended_total{state="cancelled"} 3.0' in slow.get("/metrics").text


def test_one_key_is_one_job_and_lists_have_pages(client):
    ids = []
    for key in ("a", "b", "a", "c"):
        answer = client.post("/v1/videos", data={"seed": "1"}, files=FILES, headers={"Idempotency-Key": key})
        ids.append(answer.json()["id"])
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3
    page = client.get("/v1/videos?limit=2&order=asc").json()
    assert ([x["id"] for x in page["data"]], page["has_more"]) == (ids[:2], True)
    page = client.get(f"/v1/videos?limit=2&order=asc&after={page['last_id']}").json()
    assert ([x["id"] for x in page["data"]], page["has_more"]) == (ids[3:], False)
    for id in ids:
        assert over(client, id)["status"] == "completed"
    assert "wanjax_videos_accepted_total 3.0" in client.get("/metrics").text


def test_old_videos_go(pipe, tmp_path):
    with serving(pipe, tmp_path, max_kept=2) as client:
        ids = [client.post("/v1/videos/sync", files=FILES).headers["x-video-id"] for _ in range(3)]
        until(client, ids[2], lambda _: not client.worker.jobs.video(ids[0]).exists())
        assert client.get(f"/v1/videos/{ids[0]}").status_code == 404
        assert client.get(f"/v1/videos/{ids[1]}/content").status_code == 200


def test_a_job_that_fails_is_told_and_the_next_one_runs(client, monkeypatch):
    def fail(*_, **__):
        raise InputError("the latents became NaN; x; y")

    with monkeypatch.context() as patch:
        patch.setattr(QuickPipeline, "__call__", fail)
        answer = client.post("/v1/videos/sync", files=FILES)
    assert answer.status_code == 409
    assert "became NaN" in answer.json()["error"]["message"]
    assert client.post("/v1/videos/sync", files=FILES).status_code == 200


def test_a_worker_that_ends_is_seen_in_health(pipe, tmp_path):
    jobs = Jobs(tmp_path)

    def warm(_):
        raise InputError("no such weights; a; b")

    worker = Worker(pipe, jobs, warm=warm)
    with TestClient(make_server(ServeConfig(), demo.get_config(), worker).app) as client:
        worker.join()
        answer = client.get("/health")
    assert answer.status_code == 503
    assert "no such weights" in answer.json()["error"]["message"]


def test_a_server_that_is_told_to_end_puts_its_job_back(pipe, tmp_path):
    with serving(pipe, tmp_path, pause=0.5) as client:
        id = client.post("/v1/videos", data={"steps": "100"}, files=FILES).json()["id"]
        until(client, id, lambda job: job["step"])
    jobs = Jobs(tmp_path)
    assert (jobs.get(id).state, jobs.get(id).runs) == ("queued", 0)
    jobs.close()


# ---------------------------------------------------------------------------------------------------------- small parts


def test_sizes_to_warm():
    assert sizes("720p, 64x32") == ((1280, 720), (64, 32))
    with pytest.raises(InputError, match="--warm big"):
        make_warm("big")


def test_adapters_go_by_name(pipe, tmp_path):
    """Of a folder; what a video remembers of one is its name."""
    assert recorded.lora_name("/a/b.c.safetensors:0.5") == "b.c:0.5"
    assert recorded.lora_name("/a/b.safetensors") == "b"
    shutil.copy(demo.FOLDER / "first.png", tmp_path / "broken.safetensors")
    with serving(pipe, tmp_path / "data", lora_dir=str(tmp_path)) as client:
        answer = client.post("/v1/videos", json={"lora": ["broken:0.5"]})
        assert answer.status_code == 400
        assert "broken.safetensors" in answer.json()["error"]["message"]
        assert "accepted: broken" in client.post("/v1/videos", json={"lora": ["x"]}).json()["error"]["message"]


def test_settings_of_a_video_that_has_none(tmp_path):
    with pytest.raises(InputError, match=r"first.png.*cannot be read|holds no settings"):
        recorded.read(demo.FOLDER / "first.png")


def test_prompts_are_written_out_where_a_request_asks(pipe, tmp_path):
    """Before the job runs, told all pictures; a failure is a note, and the settings of the video are those it had."""
    asked = []

    def extend(prompt, pictures):
        asked.append((prompt, [picture.size for picture in pictures]))
        return ("written out", None) if len(asked) == 1 else (prompt, "note: as given")

    jobs = Jobs(tmp_path)
    worker = Worker(pipe, jobs, extend)
    with TestClient(make_server(ServeConfig(), demo.get_config(), worker).app) as client:
        found = []
        for extended in ("true", "true", "false"):
            answer = client.post("/v1/videos/sync", data={"prompt": "x", "extend_prompt": extended}, files=FILES)
            found.append(client.get(f"/v1/videos/{answer.headers['x-video-id']}").json())
        assert recorded.read(jobs.video(found[0]["id"]))[0]["prompt"] == "written out"
    jobs.close()
    assert asked == [("x", [(64, 64), (64, 64)])] * 2
    assert [(job["prompt"], job["notes"]) for job in found] == [
        ("written out", []),
        ("x", ["note: as given"]),
        ("x", []),
    ]


def test_another_request_may_have_other_adapters(tmp_path, monkeypatch):
    """The worker takes another pipeline for it, and the first one's settings again afterwards; the video names them."""
    from wanjax.serving import worker as module

    pipe = QuickPipeline(demo.get_config(), keep="one")
    monkeypatch.setattr(module, "Pipeline", QuickPipeline)
    name, dim = "diffusion_model.blocks.0.self_attn.q", pipe.dit.dim
    tensors = {f"{name}.lora_A.weight": normal(0, 2, dim), f"{name}.lora_B.weight": normal(1, dim, 2)}
    safetensors.numpy.save_file(tensors, tmp_path / "style.safetensors")
    with serving(pipe, tmp_path / "data", lora_dir=str(tmp_path)) as client:
        seen = []
        for lora in ("style:0.5", "", "style"):
            answer = client.post("/v1/videos/sync", data={"lora": lora}, files=FILES)
            assert answer.status_code == 200, answer.text
            seen.append(recorded.read(client.worker.jobs.video(answer.headers["x-video-id"]))[1])
            assert client.worker.pipe.config.lora == ((str(tmp_path / f"style.safetensors{lora[5:]}"),) if lora else ())
        strong = client.post("/v1/videos", data={"lora": "style:much"}, files=FILES)
        assert strong.status_code == 400
    assert seen == [("style:0.5",), (), ("style",)]
