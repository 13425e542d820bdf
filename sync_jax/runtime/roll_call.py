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
        seconds: how long process 0 waits for the others, and they for it. Who has reached it waits
            for its answer, though it may have begun later.

    Returns:
        Those that did not come in time; none if all did. Process 0 where it said nothing: it was
        not reached, or ended.

    Raises:
        OSError: process 0 cannot listen there, or its host has no address.
    """
    host, _, port = address.rpartition(":")
    if index == 0:
        return _listen(int(port), count, seconds)
    return _report(host.strip("[]"), int(port), index, seconds)


def _listen(port: int, count: int, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    present: dict[int, socket.socket] = {}
    others = set(range(1, count))
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(
        ("", port), family=family, backlog=count, dualstack_ipv6=dual
    ) as server:
        while (left := deadline - time.monotonic()) > 0:
            if present.keys() == others:
                _forget_ended(present)
                if present.keys() == others:
                    break
            server.settimeout(min(_POLL, left))
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
    _forget_ended(present)
    missing = sorted(others - present.keys())
    for connection in present.values():
        with contextlib.suppress(OSError):  # it has ended since, which JAX's meeting finds out
            connection.sendall(json.dumps(missing).encode() + b"\n")
        connection.close()
    return missing


def _forget_ended(present: dict[int, socket.socket]) -> None:
    """Drops those whose side of their non-blocking connections is gone; till then they are mute."""
    for who, connection in list(present.items()):
        try:
            ended = connection.recv(1) == b""
        except BlockingIOError:
            ended = False
        except OSError:
            ended = True
        if ended:
            present.pop(who).close()


def _report(host: str, port: int, index: int, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    unknown: socket.gaierror | None = None
    while time.monotonic() < deadline:
        answer = None
        try:
            with socket.create_connection((host, port), timeout=_POLL) as connection:
                unknown = None
                connection.sendall(b"%d\n" % index)
                # Its time may have begun just now.
                answer = _answer(connection, time.monotonic() + seconds + _GRACE)
        except socket.gaierror as error:
            unknown = error  # a name server may learn of the host yet
        except OSError:
            unknown = None  # it is not there yet, or was killed
        if answer is not None:
            return answer
        time.sleep(_RETRY)
    if unknown is not None:
        raise unknown
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
