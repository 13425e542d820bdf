"""The page of the service in headless Chromium: a picture is dropped, an answer is read."""

import re
import shutil
import threading
import time

import pytest
import uvicorn

from sync_jax import SelectiveClassifier
from sync_jax.deploy.serve import create_app
from tests.deploy.test_export import files_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium"),
    # Playwright starts its driver so.
    pytest.mark.filterwarnings("ignore:.*os.fork", "ignore:Exception ignored.*_at_fork"),
]


@pytest.fixture(scope="module")
def served(run):
    """The address of a real server, with a token."""
    classifier = SelectiveClassifier.load(run)
    app = create_app(classifier, token="secret")
    # Another loop than asyncio's would become that of all tests that follow.
    config = uvicorn.Config(app, port=0, log_level="error", ws="none", loop="asyncio")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


def test_pictures_are_answered_on_the_page(run, served):
    from playwright.sync_api import sync_playwright

    classifier, files = SelectiveClassifier.load(run), files_of(run)[:3]
    expected = classifier.predict(files)
    problems, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(served)
        page.set_input_files("#files", files)
        page.wait_for_selector("#error:not(:empty)")
        assert page.inner_text("#error") == "a bearer token is needed"
        page.fill("#secret", "secret")
        for _ in range(100):  # until it has compiled
            page.set_input_files("#files", files)
            page.wait_for_timeout(300)
            if page.query_selector(".answer"):
                break
        page.wait_for_selector(".answer:nth-child(3)")
        shown = [box.inner_text() for box in page.query_selector_all(".answer")][::-1]
        for text, file, label, accepted in zip(
            shown, files, expected.label, expected.accepted, strict=True
        ):
            first = text.splitlines()[0]
            assert first == (label if accepted else "No answer")
            assert file.name in text
            shares = [float(x) for x in re.findall(r"([\d.]+) %", text)]
            assert sum(shares) == pytest.approx(100, abs=0.3)  # all three classes
        assert page.query_selector(".answer").bounding_box()["width"] <= 390
        page.set_input_files("#files", {"name": "x.png", "mimeType": "image/png", "buffer": b"x"})
        page.wait_for_selector("#error:not(:empty)")
        assert "picture 0 cannot be read" in page.inner_text("#error")
        browser.close()
    refused = [x for x in problems if "status of 4" not in x and "status of 503" not in x]
    assert refused == []
    assert {url for url in requests if not url.startswith((served, "blob:"))} == set()
