"""Takes app.png and app-phone.png: the page of `wanjax app` in Chromium, with two results of the demo model.

    python docs/pictures/page.py

Needs the extra `browser`, and Chromium.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

FOLDER = pathlib.Path(__file__).parent
LONG = 1_800_000  # milliseconds


def take(page: Any, name: str, whole: bool) -> None:
    """Two videos, and then the picture."""
    for where in ("#result", "#previous"):
        page.wait_for_selector("#generate:not([disabled])", timeout=LONG)
        page.click("#generate")
        page.wait_for_selector(f"{where} video", timeout=LONG)
    page.wait_for_timeout(2500)
    for where in ("#result", "#previous"):  # in the middle, where most is to be seen
        page.evaluate(f"() => {{ const v = document.querySelector('{where} video'); v.pause(); v.currentTime = 0.5 }}")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    page.screenshot(path=FOLDER / name, full_page=whole)


def main() -> None:
    """Run the command line."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    with tempfile.TemporaryDirectory() as data, sync_playwright() as playwright:
        server = subprocess.Popen([sys.executable, "-m", "wanjax", "app", "--port", str(port), "--data", data])
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            while True:
                with socket.socket() as place:
                    if place.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.5)
            for name, width, height, is_phone in (("app.png", 1366, 820, False), ("app-phone.png", 390, 844, True)):
                context = browser.new_context(viewport={"width": width, "height": height}, is_mobile=is_phone)
                page = context.new_page()
                page.goto(f"http://127.0.0.1:{port}", timeout=LONG)
                take(page, name, whole=is_phone)
        finally:
            browser.close()
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
