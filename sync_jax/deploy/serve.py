"""A classifier over HTTP, on FastAPI and uvicorn.

    POST /predict             pictures as multipart form, as JSON {"images": [base64, ...]}, or one
                              picture as the body
    GET  /                    a page on which pictures are dropped
    GET  /healthz, /readyz    is it alive, and does it answer
    GET  /metrics             for Prometheus
    /v2/...                   the Open Inference Protocol: health, metadata and infer

Pictures of several requests are computed together. Errors are JSON problems (RFC 9457).
"""

import asyncio
import base64
import binascii
import contextlib
import hmac
import html
import http
import importlib.resources
import io
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

import sync_jax
from sync_jax.data.images import BadImageError
from sync_jax.deploy.batching import Batcher, Limits, ProblemError
from sync_jax.deploy.monitor import Monitor
from sync_jax.deploy.stream import Classifier
from sync_jax.errors import InputError
from sync_jax.runtime.console import printable, say

_TOP = 5
_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PATHS = ("/", "/predict", "/healthz", "/readyz", "/metrics")
_OPEN = ("/", "/healthz", "/readyz")  # also without the token
_OUTPUTS = {"label": "BYTES", "confidence": "FP32", "accepted": "BOOL"}


class Metrics:
    """The Prometheus metrics of the service."""

    def __init__(self) -> None:
        """Begins at zero."""
        self.registry = kept = CollectorRegistry()
        seconds = "Seconds of a request"
        self.latency = Histogram(
            "request_seconds", seconds, ["path"], registry=kept, buckets=_LATENCIES
        )
        self.requests = Counter("requests", "Requests", ["path", "status"], registry=kept)
        self.queue = Gauge("queue_pictures", "Pictures that wait", registry=kept)
        self.predictions = Counter("predictions", "Predictions", ["accepted"], registry=kept)
        self.acceptance = Gauge("acceptance_rate", "Share answered so far", registry=kept)
        shares = [x / 20 for x in range(1, 21)]
        self.probability = Histogram(
            "probability", "Largest probability of a prediction", registry=kept, buckets=shares
        )
        self.alarms = Gauge("monitor_alarm", "1 after an alarm", ["test"], registry=kept)
        for test in ("exchangeability", "acceptance"):
            self.alarms.labels(test).set(0)


class Service:
    """A classifier with its queue, its metrics and its monitor; the methods are the routes."""

    def __init__(self, classifier: Classifier, limits: Limits, token: str):
        """Takes what is served; with a token, only `_OPEN` is without it."""
        self.classifier, self.limits, self.token = classifier, limits, token
        self.metrics, self.watch = Metrics(), Monitor(classifier.decision)
        self.batcher = Batcher(classifier, limits)
        self.is_ready = False
        self._decoding = ThreadPoolExecutor(2, "decode")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Computes batches while the application runs; it is ready once they are compiled."""
        del app
        task = asyncio.create_task(self.batcher.run())
        warm = asyncio.get_running_loop().run_in_executor(None, self._warm_up)
        yield
        self.is_ready = False
        await warm
        task.cancel()

    def _warm_up(self) -> None:
        shape, size = self.classifier.preprocessing.shape, 1
        kind = np.uint8 if len(shape) == 3 else np.float32
        while size <= self.limits.batch:  # compiled now, and not while clients wait
            self.classifier.predict(np.zeros((size, *shape), kind))
            size *= 2
        self.is_ready = True

    async def guarded(
        self, request: Request, call: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Checks token and size, and counts."""
        path, began = request.url.path, time.monotonic()
        known = path if path in _PATHS or path.startswith("/v2/") else "other"
        response = self._refused(request)
        if response is None:
            response = await call(request)
        self.metrics.requests.labels(known, response.status_code).inc()
        self.metrics.latency.labels(known).observe(time.monotonic() - began)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.limits.seconds):
                yield
        except TimeoutError:
            detail = f"not answered within {self.limits.seconds:g} s; try again"
            raise ProblemError(503, detail) from None

    def _refused(self, request: Request) -> Response | None:
        """The answer to a request that goes no further."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        length = request.headers.get("content-length", "0")
        wrong = not hmac.compare_digest(given.encode(), self.token.encode())
        if self.token and request.url.path not in _OPEN and wrong:
            response = problem(401, "a bearer token is needed")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        if not length.isdigit() or int(length) > self.limits.bytes:
            return problem(413, f"a request may have {self.limits.bytes:,} bytes")
        return None

    async def answers(self, images: list[bytes]) -> list[dict[str, Any]]:
        """Decodes encoded pictures, and answers for them."""
        most, loop = self.limits.images, asyncio.get_running_loop()
        if not images:
            raise ProblemError(422, "no picture was sent; send images")
        if len(images) > most:
            raise ProblemError(413, f"{len(images)} pictures were sent; a request may have {most}")

        def decoded(data: bytes) -> np.ndarray | str:
            return _decoded(self.classifier, data, self.limits.pixels)

        squares = await asyncio.gather(
            *(loop.run_in_executor(self._decoding, decoded, data) for data in images)
        )
        for i, square in enumerate(squares):
            if isinstance(square, str):
                raise ProblemError(422, f"picture {i} cannot be read: {square}")
        rows = await self.computed([x for x in squares if not isinstance(x, str)])
        return [_answer(self.classifier, row) for row in rows]

    async def computed(self, inputs: list[np.ndarray]) -> list[tuple[Any, ...]]:
        """Answers for inputs, with other requests'; counts and watches them."""
        if not self.is_ready:
            raise ProblemError(503, "it is not ready; try again")
        rows = await self.batcher.predict(inputs)
        for _, confidence, accepted, probabilities in rows:
            self.metrics.predictions.labels(str(bool(accepted)).lower()).inc()
            self.metrics.probability.observe(float(probabilities.max()))
            for alarm in self.watch.update(confidence):
                self.metrics.alarms.labels(alarm.test).set(1)
                say(f"alarm: {alarm.message}")
        self.metrics.acceptance.set(self.watch.accepted / self.watch.seen)
        return rows

    async def predict(self, request: Request) -> dict[str, Any]:
        """POST /predict."""
        decision = self.classifier.decision
        async with self._in_time():
            predictions = await self.answers(await _images(request, self.limits))
        return {
            "predictions": predictions,
            "threshold": _finite(decision.threshold),
            "certificate": decision.certificate,
        }

    async def healthz(self) -> dict[str, str]:
        """GET /healthz."""
        return {"status": "alive"}

    async def readyz(self) -> dict[str, str]:
        """GET /readyz."""
        if not self.is_ready:
            raise ProblemError(503, "it is not ready")
        return {"status": "ready"}

    async def shown(self) -> Response:
        """GET /metrics."""
        self.metrics.queue.set(self.batcher.waiting)
        text = generate_latest(self.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def page(self) -> HTMLResponse:
        """GET /."""
        nonce, decision = secrets.token_urlsafe(16), self.classifier.decision
        text = importlib.resources.files("sync_jax.deploy").joinpath("page.html").read_text()
        about = f"This classifier {decision.describe()}."
        values = {"ABOUT": html.escape(about), "NONCE": nonce, "OPEN": str(not self.token).lower()}
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        policy = (
            "default-src 'none'; img-src blob:; style-src 'unsafe-inline'; connect-src 'self'; "
            f"script-src 'nonce-{nonce}'; base-uri 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def live(self) -> dict[str, bool]:
        """GET /v2/health/live."""
        return {"live": True}

    async def ready(self) -> Response:
        """GET /v2/health/ready."""
        return JSONResponse({"ready": self.is_ready}, 200 if self.is_ready else 503)

    async def server(self) -> dict[str, Any]:
        """GET /v2."""
        return {"name": "sync_jax", "version": sync_jax.__version__, "extensions": []}

    async def model(self) -> dict[str, Any]:
        """GET /v2/models/classifier."""
        shape = self.classifier.preprocessing.shape
        kind = "UINT8" if len(shape) == 3 else "FP32"
        return {
            "name": "classifier",
            "versions": ["1"],
            "platform": "jax",
            "inputs": [{"name": "input", "datatype": kind, "shape": [-1, *shape]}],
            "outputs": [{"name": k, "datatype": v, "shape": [-1]} for k, v in _OUTPUTS.items()],
        }

    async def infer(self, request: Request) -> dict[str, Any]:
        """POST /v2/models/classifier/infer."""
        async with self._in_time():
            content = await _json(request, self.limits)
            inputs = _tensor(content, self.classifier, self.limits)
            rows = await self.computed(list(inputs))
        labels, confidences, accepted, _ = zip(*rows, strict=True)
        columns: dict[str, list[Any]] = {
            "label": [str(x) for x in labels],
            "confidence": [float(x) for x in confidences],
            "accepted": [bool(x) for x in accepted],
        }
        found = [
            {"name": name, "datatype": _OUTPUTS[name], "shape": [len(data)], "data": data}
            for name, data in columns.items()
        ]
        return {"model_name": "classifier", "id": str(content.get("id", "")), "outputs": found}


def create_app(classifier: Classifier, *, limits: Limits | None = None, token: str = "") -> FastAPI:
    """Makes the application."""
    service = Service(classifier, limits or Limits(), token)
    app = FastAPI(
        title="sync_jax", version=sync_jax.__version__, lifespan=service.lifespan,
        docs_url=None, redoc_url=None, openapi_url=None,
    )  # fmt: skip
    app.middleware("http")(service.guarded)
    app.get("/")(service.page)
    app.post("/predict")(service.predict)
    app.get("/healthz")(service.healthz)
    app.get("/readyz")(service.readyz)
    app.get("/metrics")(service.shown)
    app.get("/v2/health/live")(service.live)
    app.get("/v2/health/ready")(service.ready)
    app.get("/v2")(service.server)
    app.get("/v2/models/classifier")(service.model)
    app.post("/v2/models/classifier/infer")(service.infer)

    @app.exception_handler(ProblemError)
    async def told(request: Request, error: ProblemError) -> JSONResponse:
        del request
        return problem(error.status, error.detail)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        del request
        return problem(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        say(f"{request.method} {request.url.path}: {type(error).__name__}: {error}")
        return problem(500, "the server failed; its log says why")  # and nothing of its inside

    return app


def problem(status: int, detail: str) -> JSONResponse:
    """A JSON problem (RFC 9457)."""
    title = http.HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(body, status, media_type="application/problem+json")


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, which may come without a length."""
    parts, total = [], 0
    async for part in request.stream():
        total += len(part)
        if total > limits.bytes:
            raise ProblemError(413, f"a request may have {limits.bytes:,} bytes")
        parts.append(part)
    return b"".join(parts)


async def _json(request: Request, limits: Limits) -> dict[str, Any]:
    try:
        content = json.loads(await _body(request, limits))
    except (ValueError, RecursionError):
        raise ProblemError(400, "the body is no JSON") from None
    if not isinstance(content, dict):
        raise ProblemError(422, "the body must be a JSON object")
    return content


async def _images(request: Request, limits: Limits) -> list[bytes]:
    """The encoded pictures of a request, by its content type."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        if "content-length" not in request.headers:
            raise ProblemError(411, "a form needs a Content-Length")
        try:
            async with request.form(max_files=limits.images, max_fields=limits.images) as form:
                files = [x for _, x in form.multi_items() if isinstance(x, UploadFile)]
                return [await file.read() for file in files]
        except (MultiPartException, HTTPException, ValueError) as error:
            reason = getattr(error, "detail", None) or getattr(error, "message", None) or str(error)
            raise ProblemError(400, f"the form cannot be read: {printable(reason)[:200]}") from None
    if kind == "application/json":
        given = (await _json(request, limits)).get("images")
        if not isinstance(given, list) or not all(isinstance(x, str) for x in given):
            raise ProblemError(422, "images must be a list of base64 strings")
        try:
            return [base64.b64decode(x, validate=True) for x in given]
        except (binascii.Error, ValueError):
            raise ProblemError(422, "images hold a string that is no base64") from None
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [await _body(request, limits)]
    raise ProblemError(415, "send multipart/form-data, application/json, or a picture as image/...")


def _decoded(classifier: Classifier, data: bytes, pixels: int) -> np.ndarray | str:
    """The square of a picture, or why there is none."""
    if len(classifier.preprocessing.shape) != 3:
        return "the classifier takes features; use /v2/models/classifier/infer"
    try:
        with Image.open(io.BytesIO(data)) as image:  # its header alone
            if image.width * image.height > pixels:
                return f"{image.width} x {image.height} pixels are too many"
    except Exception:
        return "it is no picture of a known kind"
    try:
        return classifier.preprocessing.picture(data)
    except BadImageError as error:
        return printable(str(error))[:200]


def _answer(classifier: Classifier, row: tuple[Any, ...]) -> dict[str, Any]:
    label, confidence, accepted, probabilities = row
    classes = classifier.decision.classes
    best = np.argsort(-probabilities, kind="stable")[:_TOP]
    return {
        "label": str(label),
        "confidence": _finite(float(confidence)),
        "accepted": bool(accepted),
        "reason": "" if accepted else "the confidence is below the threshold",
        "top": [
            {
                "label": str(i if classes is None else classes[i]),
                "probability": float(probabilities[i]),
            }
            for i in best
        ],
    }


def _tensor(content: dict[str, Any], classifier: Classifier, limits: Limits) -> np.ndarray:
    """The input of the Open Inference Protocol, version 2."""
    shape = classifier.preprocessing.shape
    kind, dtype = ("UINT8", np.uint8) if len(shape) == 3 else ("FP32", np.float32)
    try:
        (given,) = content["inputs"]
        size = [int(x) for x in given["shape"]]
        if given["datatype"] != kind or tuple(size[1:]) != shape:
            raise ValueError
        data = np.asarray(given["data"], np.float64).reshape(size)
        if kind == "UINT8" and not ((data >= 0) & (data <= 255) & (data == data.round())).all():
            raise ValueError
        inputs = classifier.preprocessing.batch(data.astype(dtype))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ProblemError(
            422, f"inputs must be one {kind} tensor of shape [n, {', '.join(map(str, shape))}]"
        ) from None
    if not 0 < len(inputs) <= limits.images:
        raise ProblemError(413, f"a request may have 1 to {limits.images} inputs")
    return inputs


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def serve(classifier: Classifier, *, host: str, port: int, token: str = "") -> None:
    """Serves until SIGTERM or Ctrl-C; requests in progress are answered first.

    Raises InputError where others than this machine could connect without a token.
    """
    if not token and not _is_loopback(host):
        raise InputError(
            f"--host={host} lets other machines connect: set a token in the environment variable "
            "SYNC_JAX_TOKEN, which clients send as 'Authorization: Bearer TOKEN'"
        )
    app = create_app(classifier, token=token)
    say(f"serving on http://{host}:{port}; Ctrl-C stops it")
    uvicorn.run(
        app, host=host, port=port, log_level="warning", server_header=False, date_header=False,
        ws="none", timeout_graceful_shutdown=30, timeout_keep_alive=30, limit_concurrency=1000,
    )  # fmt: skip


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
