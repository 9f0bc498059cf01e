"""What tests of serving share: raw calls, and the figures of a running server."""

import json
import re
import socket
import time
import urllib.error
import urllib.request

MODEL = "org/tiny"
JSON = {"Content-Type": "application/json", "Authorization": "Bearer secret"}


def post(server, body, path="/v1/completions", headers=JSON):
    """Status, headers and content of the answer to a body, which may be bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return get(server, path, headers, data)


def get(server, path, headers=JSON, data=None):
    """Status, headers and content of an answer; the content is read if it is JSON."""
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, told, text = answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, told, text = error.code, error.headers, error.read()
    is_json = told.get("content-type") == "application/json"
    return status, told, json.loads(text) if is_json else text.decode()


def metric(server, name, **labels):
    """The value of a metric of a server."""
    _, _, text = get(server, "/metrics")
    wanted = "".join(f'(?=.*{key}="{value}")' for key, value in labels.items())
    [value] = re.findall(rf"^{name}\{{{wanted}.*\}} (\S+)$", text, re.MULTILINE)
    return float(value)


def until(true, seconds=30):
    """Waits until something is true, and fails if it does not come to be."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.005)


def sent(server, data, room=None):
    """A connection over which so much of a request was sent; `room` bytes wait to be taken, and no more."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.settimeout(30)
    if room is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    connection.connect((host, int(port)))
    connection.sendall(data)
    return connection


def rest(connection):
    """Everything that comes until the server closes a connection."""
    with connection:
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def request(body, length=None, path="/v1/completions"):
    """The bytes of a request; `length` is what its head says of the body."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer secret\r\nContent-Length: {len(data) if length is None else length}\r\n\r\n"
    )
    return head.encode() + data
