"""The page in a real browser: it plays, follows a new prompt, pauses, saves, and looks right.

Needs Chromium, its driver and selenium. `SF_JAX_PICTURES=docs/pictures python -m pytest tests/test_browser.py` writes
the documentation's screenshots.
"""

import io
import os
import shutil
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.server_process import running

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[browser]'")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--window-size=1280,980",
)
# Draws the video or the canvas at 24 x 24 pixels.
PIXELS = """
const small = document.createElement("canvas");
[small.width, small.height] = [24, 24];
const context = small.getContext("2d");
context.drawImage(video.hidden ? canvas : video, 0, 0, 24, 24);
return Array.from(context.getImageData(0, 0, 24, 24).data).filter((_, i) => i % 4 == 0);
"""


@pytest.fixture(scope="module")
def server():
    with running("--slots=2") as server:
        yield server


@pytest.fixture
def browser(tmp_path):
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    try:
        yield browser
    finally:
        browser.quit()


def by_id(browser, name):
    return browser.find_element("id", name)


def wait(condition, seconds=20.0):
    """Waits for a condition to become true; returns its value."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("nothing happened")


def opened(browser, server, query=""):
    """Opens the page and plays a 7."""
    browser.get(f"http://{server.address}/{query}")
    wait(lambda: by_id(browser, "start").is_enabled())
    write(browser, "prompt", "a 7 moving left, fast")
    write(browser, "seed", "3")
    by_id(browser, "start").click()
    wait(lambda: by_id(browser, "chunk").text.isdecimal() and int(by_id(browser, "chunk").text) > 3)


def write(browser, name, text):
    field = by_id(browser, name)
    field.clear()
    field.send_keys(text)


def shown(browser):
    return np.array(browser.execute_script(PIXELS), np.uint8).reshape(24, 24, 1)


def position(browser):
    return browser.execute_script("return video.currentTime")


def picture(browser, name):
    data = browser.get_screenshot_as_png()
    folder = os.environ.get("SF_JAX_PICTURES")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        image = Image.open(io.BytesIO(data)).convert("RGB").quantize(64)
        image.save(Path(folder) / f"{name}.png", optimize=True)
    return data


def digit_at(browser, judge, second):
    """The judge's digit for a chunk that begins at the given second of the paused video."""
    frames = []
    for i in range(3):
        browser.execute_script("video.currentTime = arguments[0]", second + (i + 0.5) / 12)
        wait(lambda: not browser.execute_script("return video.seeking"))
        time.sleep(0.1)
        frames.append(shown(browser))
    return int(np.asarray(judge(np.stack(frames)[None]).digit)[0, 0].argmax())


def test_the_page(server, browser, tmp_path):
    from sf_jax.evaluation import judge as judging

    judge = judging.load()
    opened(browser, server)
    before = position(browser)
    wait(lambda: position(browser) > before + 1)
    assert shown(browser).max() > 100 and browser.execute_script("return video.videoWidth") == 384
    followed = 0
    for number, digit in enumerate((2, 5, 8), 1):
        write(browser, "prompt", f"a {digit} moving up")
        by_id(browser, "prompt").send_keys(selenium.Keys.CONTROL, selenium.Keys.ENTER)
        history = wait(lambda n=number: (items := browser.find_elements("css selector", "#history li"))[n:] and items)
        text = history[0].text
        assert text.startswith(f"a {digit} moving up from chunk ")
        second_chunk = (int(text.rsplit(" ", 1)[1]) + 1) * 3 / 12
        wait(lambda at=second_chunk: position(browser) > at + 0.3)
        by_id(browser, "pause").click()
        now = position(browser)
        followed += digit_at(browser, judge, second_chunk) == digit
        browser.execute_script("video.currentTime = arguments[0]", now)
        at = position(browser)
        time.sleep(0.7)
        assert position(browser) == at
        by_id(browser, "pause").click()
        wait(lambda at=at: position(browser) > at + 0.5)
    assert followed >= 2
    picture(browser, "page")
    by_id(browser, "download").click()
    path = tmp_path / "self-forcing.mp4"
    wait(path.exists)
    time.sleep(0.5)
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert file.start_time == 0
    assert len(frames) > 60 and frames[-1].shape == (384, 384, 3) and max(frame.max() for frame in frames) > 100
    write(browser, "prompt", "a cat")
    by_id(browser, "start").click()
    wait(lambda: "unknown word 'cat'" in by_id(browser, "error").text)
    by_id(browser, "stop").click()
    wait(lambda: by_id(browser, "status").text == "Stopped.")
    assert by_id(browser, "start").text == "Start"
    messages = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not messages, messages


def test_the_page_on_a_phone(server, browser):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened(browser, server)
    wait(lambda: position(browser) > 1)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.execute_script("scrollTo(0, 0)")
    picture(browser, "page-phone")
    by_id(browser, "stop").click()


def test_where_the_browser_has_no_h264(server, browser):
    opened(browser, server, "?jpeg")
    wait(lambda: shown(browser).max() > 100)
    first = shown(browser)
    wait(lambda: (shown(browser) != first).mean() > 0.1)
    assert by_id(browser, "video").is_displayed() is False
    by_id(browser, "stop").click()


# Keeps the page's WebSockets, and lets a test shift the time.
SOCKETS = """
window.sockets = [];
window.later = 0;
const now = Date.now;
Date.now = () => now() + window.later;
window.WebSocket = class extends WebSocket {
  constructor(url) {
    super(url);
    window.sockets.push(this);
  }
};
"""
LOST = """
const socket = sockets.at(-1), closed = socket.onclose;
socket.onopen = socket.onmessage = socket.onclose = null;
socket.close();
closed({ code: 1012 });
"""


def test_the_page_whatever_happens_to_its_connection(server, browser):
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SOCKETS})
    browser.get(f"http://{server.address}/")
    wait(lambda: by_id(browser, "start").is_enabled())
    # Stop before the connection is there
    browser.execute_script("start.click(); document.getElementById('stop').click()")
    assert by_id(browser, "status").text == "Stopped." and by_id(browser, "start").is_enabled()
    # a server that goes away before the video begins: the page tries again with the same prompt
    write(browser, "prompt", "a 1 moving up")
    browser.execute_script(f"start.click(); {LOST}")
    assert "tries again by itself" in by_id(browser, "curtain").text
    write(browser, "prompt", "something else")
    wait(lambda: "a 1 moving up from chunk 0" in by_id(browser, "history").text)
    by_id(browser, "stop").click()
    wait(lambda: by_id(browser, "status").text == "Stopped.")
    # Stop between two tries
    write(browser, "prompt", "a 2 moving up")
    browser.execute_script(f"start.click(); {LOST}")
    by_id(browser, "stop").click()
    count = browser.execute_script("return sockets.length")
    assert by_id(browser, "curtain").text == "Stopped."
    time.sleep(6)
    assert browser.execute_script("return sockets.length") == count
    # a connection that no longer answers
    by_id(browser, "start").click()
    wait(lambda: "a 2 moving up from chunk 0" in by_id(browser, "history").text)
    browser.execute_script("sockets.at(-1).onmessage = null; later = 1e4")
    time.sleep(0.5)  # until it has sent another ping
    browser.execute_script("later = 1e5")
    wait(lambda: "The connection is lost" in by_id(browser, "error").text)
    assert by_id(browser, "start").text == "Start"
