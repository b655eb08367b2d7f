"""The page in Chromium: a video from two pictures, previews before it, stop, settings restored, no serious fault."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import safetensors.numpy
from tiny import PATIENCE, ROOT, environment, normal

from wanjax import demo
from wanjax.conditioning.images import read_image
from wanjax.sampling.pipeline import Pipeline

pytestmark = pytest.mark.browser

MS = 1000 * PATIENCE
# Uploaded the other way round than the page shows them at its start.
FIRST, LAST = demo.FOLDER / "last.png", demo.FOLDER / "first.png"
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def start(command, folder, **variables):
    """A page over a data folder: its process and address; PAGE_COMPILE_CACHE keeps programs for another run."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    variables["WANJAX_COMPILE_CACHE"] = os.environ.get("PAGE_COMPILE_CACHE", str(folder / "cache"))
    command = [sys.executable, *command, "--port", str(port), "--data", str(folder / "data")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(1, **variables))
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of the demo's page."""
    process, address = start(["-m", "wanjax", "app"], tmp_path_factory.mktemp("demo"))
    yield address
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def slow_address(tmp_path_factory):
    """Of a page whose steps take a second."""
    process, address = start(["tests/tiny_server.py"], tmp_path_factory.mktemp("slow"), PAGE="1", PAUSE="1")
    yield address
    process.kill()
    process.wait()


def opened(browser, address, wait_for="#generate", **size):
    """The page, when its parts are there."""
    page = browser.new_page(viewport={"width": 1366, "height": 860} | size)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            page.goto(address, timeout=MS)
            break
        except Exception:  # the server is not there yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    page.wait_for_selector(wait_for, timeout=MS)
    return page


def upload(page, where, path):
    """A picture in place of the one that is there."""
    shown = f"() => (document.querySelector('{where} img') || {{}}).src"
    before = page.evaluate(shown)
    page.set_input_files(f"{where} input[type=file]", path, timeout=MS)
    page.wait_for_function(f"before => (({shown})() || before) !== before", arg=before, timeout=MS)


def unfold(page, *names):
    for name in names:
        page.click(f"#{name} > button", timeout=MS)


def value(page, name):
    return page.input_value(f"#setting-{name} input, #setting-{name} textarea")


def psnr(a, b):
    return -10 * np.log10(np.mean((np.asarray(a) / 255.0 - np.asarray(b) / 255.0) ** 2))


def test_two_pictures_become_a_video_whose_settings_come_back(browser, address, tmp_path):
    page = opened(browser, address)
    page.evaluate(
        """() => { window.steps = new Set(); new MutationObserver(() => { const found =
        document.querySelector('#stage img.preview'); if (found) window.steps.add(found.dataset.step) })
        .observe(document.body, {subtree: true, childList: true, attributes: true}) }"""
    )
    upload(page, "#first", FIRST)
    upload(page, "#last", LAST)
    prompt = "a cyan triangle moves straight from bottom to top and grows"
    page.fill("#setting-prompt textarea", prompt)
    unfold(page, "advanced", "restore-fold")
    page.uncheck("#random input")
    page.fill("#setting-seed input", "7")
    page.click("#generate")
    page.wait_for_selector("#result video", timeout=MS)
    assert page.evaluate("() => window.steps.size") >= 1  # before the video
    page.wait_for_function("() => document.querySelector('#result video').currentTime > 0.1", timeout=MS)

    path = tmp_path / "video.mp4"
    path.write_bytes(page.request.get(page.evaluate("() => document.querySelector('#result video').currentSrc")).body())
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 17
    ends = psnr(frames[0], read_image(FIRST)), psnr(frames[-1], read_image(LAST))
    assert min(ends) >= 30, ends

    page.fill("#setting-prompt textarea", "something else")
    page.fill("#setting-seed input", "8")
    page.fill("#setting-shift input, #setting-shift textarea", "3")
    page.set_input_files("#restore input[type=file]", path)
    page.wait_for_function("() => document.querySelector('#progress').innerText.includes('restored')", timeout=MS)
    found = {name: value(page, name) for name in ("prompt", "seed", "shift")}
    assert found == {"prompt": prompt, "seed": "7", "shift": "40"}

    page.click("#generate")  # the one before stands beside it
    page.wait_for_selector("#previous video", timeout=MS)
    page.close()


def test_stop_within_a_step(browser, slow_address):
    """Pressed after the second step; the step in which the server hears of it is the last."""
    page = opened(browser, slow_address)
    unfold(page, "advanced")
    page.fill("#setting-steps input[type=number]", "50")
    page.press("#setting-steps input[type=number]", "Tab")
    page.click("#generate")
    page.wait_for_selector("#stage img.preview[data-step='2']", timeout=MS)
    page.click("#stop")
    page.wait_for_function("() => document.querySelector('#progress').innerText.includes('Stopped')", timeout=MS)
    job = page.request.get(f"{slow_address}/v1/videos?limit=1").json()["data"][0]
    assert job["status"] == "cancelled"
    steps = job["timings"]
    assert 2 <= steps["steps when cancelled"] <= steps["steps"] <= steps["steps when cancelled"] + 1 < 50
    page.wait_for_selector("#generate:not([disabled])", timeout=MS)
    page.close()


def test_what_is_wrong_is_told_on_the_page(browser, slow_address):
    page = opened(browser, slow_address)
    unfold(page, "advanced")
    page.fill("#setting-width input, #setting-width textarea", "65")
    page.click("#generate")
    page.wait_for_selector("#progress .failed", timeout=MS)
    assert "65" in page.inner_text("#progress")
    page.close()


def test_keyframes_stand_on_the_line(browser, slow_address):
    page = opened(browser, slow_address)
    unfold(page, "keyframes")
    assert page.locator("#time-line .mark").count() == 2
    page.set_input_files("#keyframes input[type=file]", FIRST)
    page.wait_for_function("() => document.querySelectorAll('#time-line .mark').length == 3", timeout=MS)
    assert "8" in page.locator("#time-line .mark small").nth(2).inner_text()  # the middle of 17 frames
    page.click("#generate")
    page.wait_for_selector("#result video", timeout=MS)
    page.close()


@pytest.mark.parametrize("size", [(1366, 860), (390, 844)])
def test_no_serious_fault(browser, slow_address, size):
    """axe-core finds none on a laptop nor on a phone, with all folds open; nothing is wider than the screen."""
    from axe_playwright_python.sync_playwright import Axe

    page = opened(browser, slow_address, width=size[0], height=size[1])
    unfold(page, "keyframes", "loras", "advanced", "restore-fold")
    page.click("#generate")
    page.wait_for_selector("#result video", timeout=MS)
    found = Axe().run(page).response["violations"]
    serious = [x for x in found if x["impact"] in ("serious", "critical")]
    assert not serious, json.dumps([(x["id"], [node["html"][:200] for node in x["nodes"]]) for x in serious], indent=1)
    assert page.evaluate("() => document.scrollingElement.scrollWidth - window.innerWidth") <= 0
    page.close()


def test_presets_fill_the_fields_and_adapters_have_strengths(browser, slow_address, tmp_path):
    page = opened(browser, slow_address)
    unfold(page, "advanced", "loras")
    page.click("#preset input")
    page.click("[role=option]:has-text('selfforcing4')")
    page.wait_for_function("() => document.querySelector('#setting-sigmas textarea').value != ''", timeout=MS)
    assert value(page, "sigmas").startswith("1, 0.9375, 0.8333333")
    dim = Pipeline(demo.get_config(), keep="one").dit.dim
    name = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{name}.lora_A.weight": normal(0, 2, dim), f"{name}.lora_B.weight": normal(1, dim, 2)}
    safetensors.numpy.save_file(tensors, tmp_path / "style.safetensors")
    page.set_input_files("#loras input[type=file]", tmp_path / "style.safetensors")
    page.wait_for_selector("#loras input[type=range]", timeout=MS)
    page.fill("#loras input[type=number]", "0.5")
    page.press("#loras input[type=number]", "Tab")
    page.wait_for_timeout(1000)  # the strength reaches the server
    page.click("#generate")
    page.wait_for_selector("#result video", timeout=MS)
    job = page.request.get(f"{slow_address}/v1/videos?limit=1").json()["data"][0]
    assert job["lora"] == ["style:0.5"]
    assert job["settings"]["sigmas"][:2] == [1, 0.9375]
    page.close()


def test_the_key_opens_the_page(browser, tmp_path):
    """As its password; /v1/videos takes it as a bearer's."""
    process, address = start(["tests/tiny_server.py"], tmp_path, PAGE="1", WANJAX_API_KEY="secret")
    try:
        page = opened(browser, address, wait_for="input[type=password]")
        page.fill("input:not([type=password])", "wanjax")
        page.fill("input[type=password]", "secret")
        page.press("input[type=password]", "Enter")
        page.wait_for_selector("#generate", timeout=MS)
        assert page.request.get(f"{address}/v1/videos").status == 401
        headers = {"Authorization": "Bearer secret"}
        assert page.request.get(f"{address}/v1/videos", headers=headers).status == 200
        page.close()
    finally:
        process.kill()
        process.wait()
