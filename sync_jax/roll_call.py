"""Who of several processes has come, before JAX's own meeting: that cannot say who is missing."""

import contextlib
import json
import socket
import time

_POLL = 1.0  # seconds after which a wait looks at the clock
_RETRY = 0.2  # seconds between two attempts to reach process 0
_GRACE = 5.0  # seconds for process 0's answer to arrive after its time is over


def roll_call(address: str, count: int, index: int, *, seconds: float) -> list[int]:
    """Waits until all processes have come, and tells all of them who has not.

    Process 0 listens where JAX's service will, and is told by each other which it is.

    Args:
        address: HOST:PORT, a free port of process 0's host; the same for all.
        count: how many processes there are.
        index: which one this is, from 0.
        seconds: how long to wait.

    Returns:
        Those that did not come in time; none if all did. Process 0 alone where it is not reached.

    Raises:
        OSError: process 0 cannot listen there.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    if index == 0:
        return _listen(int(port), count, deadline)
    return _report(host.strip("[]"), int(port), index, deadline)


def _listen(port: int, count: int, deadline: float) -> list[int]:
    present: dict[int, socket.socket] = {}
    others = set(range(1, count))
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(
        ("", port), family=family, backlog=count, dualstack_ipv6=dual
    ) as server:
        server.settimeout(_POLL)
        while time.monotonic() < deadline:
            if present.keys() == others:
                for who in [who for who, x in present.items() if _has_ended(x)]:
                    present.pop(who).close()
                if present.keys() == others:
                    break
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            connection.settimeout(_POLL)
            try:
                who = int(connection.recv(64))
            except (OSError, ValueError):  # none of ours, or one that has ended
                who = 0
            if who not in others:
                connection.close()
                continue
            if who in present:  # and was started anew
                present[who].close()
            connection.setblocking(False)
            present[who] = connection
    missing = sorted(others - present.keys())
    for connection in present.values():
        with contextlib.suppress(OSError):  # it has ended since, which JAX's meeting finds out
            connection.sendall(json.dumps(missing).encode() + b"\n")
        connection.close()
    return missing


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other side of a non-blocking connection is gone: till then it says nothing."""
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _report(host: str, port: int, index: int, deadline: float) -> list[int]:
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=_POLL) as connection:
                connection.sendall(b"%d\n" % index)
                answer = _answer(connection, deadline + _GRACE)
        except OSError:  # it is not there yet, or was killed
            answer = None
        if answer is not None:
            return answer
        time.sleep(_RETRY)
    return [0]


def _answer(connection: socket.socket, deadline: float) -> list[int] | None:
    """What process 0 says in the end; None if it ends without a word."""
    data = b""
    while not data.endswith(b"\n") and time.monotonic() < deadline:
        try:
            received = connection.recv(1 << 16)
        except TimeoutError:
            continue
        if not received:
            return None
        data += received
    try:
        missing: list[int] = json.loads(data)
    except ValueError:
        return None
    return missing
