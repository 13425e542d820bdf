"""The service: answers, refusals, limits, and what it leaks (nothing)."""

import asyncio
import base64
import io
import json
import re
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from sync_jax import SelectiveClassifier
from sync_jax.deploy import serve
from sync_jax.deploy.batching import Batcher, Limits, ProblemError
from sync_jax.errors import InputError
from tests.deploy.test_export import files_of

LIMITS = Limits(bytes=60_000, images=4, pixels=10_000, batch=4)


@pytest.fixture(scope="module")
def classifier(run):
    return SelectiveClassifier.load(run)


@pytest.fixture(scope="module")
def client(classifier):
    with TestClient(
        serve.create_app(classifier, limits=LIMITS), raise_server_exceptions=False
    ) as client:
        for _ in range(300):
            if client.get("/readyz").status_code == 200:
                break
            time.sleep(0.1)
        yield client


@pytest.fixture(scope="module")
def files(run):
    return files_of(run)[:4]


def encoded(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_every_way_to_send_pictures_gives_the_same_answers(client, classifier, files):
    expected = classifier.predict(files)
    data = [file.read_bytes() for file in files]
    names = [("images", (file.name, x)) for file, x in zip(files, data, strict=True)]
    form = client.post("/predict", files=names)
    texts = {"images": [base64.b64encode(x).decode() for x in data]}
    as_json = client.post("/predict", json=texts)
    single = client.post("/predict", content=data[0], headers={"content-type": "image/png"})
    assert form.status_code == as_json.status_code == single.status_code == 200
    assert form.json() == as_json.json()
    assert single.json()["predictions"][0]["label"] == form.json()["predictions"][0]["label"]
    rows = form.json()["predictions"]
    for row, label, confidence, accepted, probabilities in zip(rows, *expected, strict=True):
        assert (row["label"], row["accepted"]) == (label, accepted)
        assert row["confidence"] == pytest.approx(confidence, rel=1e-4)
        assert row["top"][0]["label"] == label
        assert row["top"][0]["probability"] == pytest.approx(probabilities.max(), rel=1e-4)
        assert (row["reason"] == "") == accepted
    assert form.json()["threshold"] == classifier.threshold


def bomb():
    """A PNG of 20,000 x 20,000 pixels in a few bytes."""
    header = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    chunk = len(header[4:]).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk


PNG = encoded(Image.new("RGB", (8, 8)))
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
BAD_PICTURES = {
    "nothing": b"", "text": b"hello", "zeros": bytes(5000), "cut": PNG[:40], "svg": SVG,
    "postscript": b"%!PS-Adobe-3.0\nshowpage", "pdf": b"%PDF-1.7", "bomb": bomb(),
    "wide": encoded(Image.new("L", (10_001, 1))), "gif": b"GIF89a", "zip": b"PK\x03\x04" + SVG,
    "pickle": b"\x80\x04cos\nsystem\n", "html": b"<html>", "tiff": b"II*\x00" + b"\xff" * 64,
    "jpeg": b"\xff\xd8\xff\xe0" + bytes(20), "webp": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
}  # fmt: skip
PNG_TYPE = {"content-type": "image/png"}
JSON_TYPE = {"content-type": "application/json"}
FORM = "multipart/form-data; boundary=x"
BAD_REQUESTS = {
    "no type": ({"content": PNG, "headers": {"content-type": ""}}, 415),
    "a type of no picture": ({"content": PNG, "headers": {"content-type": "text/html"}}, 415),
    "no JSON": ({"content": b"{", "headers": JSON_TYPE}, 400),
    "deep JSON": ({"content": b"[" * 50_000, "headers": JSON_TYPE}, 400),
    "a list": ({"json": []}, 422),
    "no pictures": ({"json": {"images": []}}, 422),
    "numbers": ({"json": {"images": [1]}}, 422),
    "no base64": ({"json": {"images": ["?"]}}, 422),
    "no unicode": ({"content": b"\xff", "headers": JSON_TYPE}, 400),
    "an empty form": ({"files": [("x", ("x", b""))]}, 422),
    "fields alone": ({"data": {"images": "x"}, "files": []}, 415),
    "a broken form": ({"content": b"--x\r\nbad", "headers": {"content-type": FORM}}, 422),
    "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
    "too many": ({"files": [("images", ("x.png", PNG))] * 5}, 400),
    "too many in JSON": ({"json": {"images": [base64.b64encode(PNG).decode()] * 5}}, 413),
    "too large": ({"content": bytes(60_001), "headers": PNG_TYPE}, 413),
    "without a length": ({"content": (bytes(10_000) for _ in range(9)), "headers": PNG_TYPE}, 413),
}


@pytest.mark.parametrize("name", [*BAD_PICTURES, *BAD_REQUESTS])
def test_bad_uploads_are_refused(client, name):
    """Each a problem in JSON, without a path, a class or a line of a program."""
    if name in BAD_PICTURES:
        request, status = {"content": BAD_PICTURES[name], "headers": PNG_TYPE}, 422
    else:
        request, status = BAD_REQUESTS[name]
    response = client.post("/predict", **request)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body.keys() == {"type", "title", "status", "detail"}
    assert not re.search(r"Traceback|\.py|0x[0-9a-f]{6}|/(tmp|root|home|usr)/|Error", response.text)
    assert client.get("/readyz").status_code == 200


def test_other_paths_and_methods(client):
    assert client.get("/predict").status_code == 405
    assert client.get("/../etc/passwd").status_code == 404
    assert client.get("/docs").status_code == 404
    assert client.get("/healthz").json() == {"status": "alive"}


def test_metrics_are_prometheus(client, files):
    before = client.get("/metrics").text
    client.post("/predict", content=files[0].read_bytes(), headers=PNG_TYPE)
    after = client.get("/metrics").text

    def value(text, name):
        return sum(float(x) for x in re.findall(rf"^{re.escape(name)}\S* (\S+)$", text, re.M))

    assert value(after, "predictions_total") == value(before, "predictions_total") + 1
    assert value(after, "probability_count") == value(before, "probability_count") + 1
    for name in ("request_seconds_bucket", "queue_pictures", "acceptance_rate", "monitor_alarm"):
        assert f"\n{name}" in after
    assert 'requests_total{path="other",status="404"}' in after  # whatever path was asked for


def test_the_open_inference_protocol(client, classifier, files):
    shape = [2, *classifier.preprocessing.shape]
    inputs = classifier.preprocessing.batch(files[:2])
    tensor = {"name": "input", "datatype": "UINT8", "shape": shape, "data": inputs.ravel().tolist()}
    url = "/v2/models/classifier/infer"
    found = client.post(url, json={"id": "7", "inputs": [tensor]}).json()
    assert (found["id"], found["model_name"]) == ("7", "classifier")
    outputs = {x["name"]: x["data"] for x in found["outputs"]}
    assert outputs["label"] == classifier.predict(files[:2]).label.tolist()
    for bad in (
        {},
        {"inputs": [tensor | {"datatype": "FP32"}]},
        {"inputs": [tensor | {"shape": [2, 3]}]},
        {"inputs": [tensor | {"data": [0.5] * inputs.size}]},
        {"inputs": [tensor, tensor]},
    ):
        assert client.post(url, json=bad).status_code == 422
    assert client.get("/v2/models/classifier").json()["inputs"][0]["shape"] == [-1, *shape[1:]]
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2").json()["name"] == "sync_jax"


def test_with_a_token(classifier):
    client = TestClient(serve.create_app(classifier, limits=LIMITS, token="secret"))
    for path in ("/metrics", "/v2"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret2"}):
            response = client.get(path, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
    assert client.get("/v2", headers={"Authorization": "Bearer secret"}).status_code == 200
    for path in ("/", "/healthz"):
        assert client.get(path).status_code == 200
    assert client.get("/readyz").status_code == 503  # nothing was compiled


def test_the_page_runs_its_own_script_alone(client, classifier):
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    (nonce,) = re.findall(r"script-src 'nonce-([^']+)'", policy)
    assert policy.startswith("default-src 'none'")
    assert response.text.count("<script") == response.text.count(f'<script nonce="{nonce}">') == 1
    assert "@" not in re.sub(r"@media", "", response.text)
    assert client.get("/").headers["content-security-policy"] != policy


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_other_machines_need_a_token(classifier, host):
    with pytest.raises(InputError, match="SYNC_JAX_TOKEN"):
        serve.serve(classifier, host=host, port=0)


# --- Batches ------------------------------------------------------------------------------------


class Slow:
    """A classifier that notes its batches; confidence is the picture's first number."""

    def __init__(self):
        self.sizes, self.free = [], threading.Event()

    def predict(self, inputs):
        self.free.wait(10)
        self.sizes.append(len(inputs))
        if (inputs < 0).any():
            raise RuntimeError("broken")
        first = inputs[:, 0]
        return first, first, first > 0, first


def test_requests_are_computed_together_and_get_their_own_answers():
    slow = Slow()

    async def go():
        batcher = Batcher(slow, Limits(batch=4, waiting=6, delay=0.05))
        work = asyncio.create_task(batcher.run())
        inputs = [np.array([float(i)]) for i in range(6)]
        first = [asyncio.create_task(batcher.predict([x])) for x in inputs]
        await asyncio.sleep(0.2)  # four are computed, two wait
        with pytest.raises(ProblemError, match="too many pictures are waiting"):
            await batcher.predict(inputs[:5])
        first[5].cancel()
        slow.free.set()
        rows = [(await task)[0] for task in first[:5]]
        assert [row[0] for row in rows] == [0, 1, 2, 3, 4]
        with pytest.raises(RuntimeError, match="broken"):
            await batcher.predict([np.array([-1.0])])
        assert (await batcher.predict([np.array([3.0])]))[0][0] == 3  # goes on
        work.cancel()

    asyncio.run(go())
    assert slow.sizes == [4, 1, 1, 1]  # nobody waited for the sixth


def test_an_error_inside_is_told_without_its_inside(classifier, files, capsys):
    app = serve.create_app(classifier, limits=LIMITS)
    with TestClient(app, raise_server_exceptions=False) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.05)
        service = app.router.routes[0].endpoint.__self__
        service.batcher._classifier = Slow()
        service.batcher._classifier.predict = lambda inputs: 1 / 0
        response = client.post("/predict", content=files[0].read_bytes(), headers=PNG_TYPE)
    assert response.status_code == 500
    assert response.json()["detail"] == "the server failed; its log says why"
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_request_that_takes_too_long(classifier, files):
    limits = Limits(bytes=60_000, seconds=0.5, batch=1)
    app = serve.create_app(classifier, limits=limits)
    with TestClient(app, raise_server_exceptions=False) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.05)
        service = app.router.routes[0].endpoint.__self__
        slow = service.batcher._classifier = Slow()
        response = client.post("/predict", content=files[0].read_bytes(), headers=PNG_TYPE)
        slow.free.set()
    assert response.status_code == 503
    assert "not answered within 0.5 s" in json.loads(response.text)["detail"]
