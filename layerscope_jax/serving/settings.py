"""How a server is to listen, and what it takes at most."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerscope_jax.generation.requests import is_number
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.units import is_integer


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server is to listen, and what it takes at most.

    Attributes:
        host: address to listen on; the default is reached from this machine alone.
        port: port to listen on; 0 for any that is free.
        api_key: what clients must send as `Authorization: Bearer KEY`; None for no key.
        served_model_name: name under which clients ask for the model.
        max_waiting: most samples that wait for a slot, beyond the `max_num_seqs` that run at once; further
            requests get status 429.
        max_connections: most connections at once. A further one takes the place of one that waits for a
            request; if requests of all are being answered, it gets status 503. None for half as many as the
            process may have open files, at most 4096.
        max_model_len: most tokens of a prompt and its answer together; None for the model's context. The
            caches of all slots become as long as the longest request, so this bounds their memory.
        max_body_bytes: most bytes of a request's body; larger ones get status 413.
        timeout_s: time (s) within which all of a request must have arrived, and within which a client must
            take what it is sent.
        drain_s: time (s) that running requests have to end when the server is told to stop.

    >>> ServerConfig(port=-1)
    Traceback (most recent call last):
    ValueError: port must be a whole number in 0..65535, got -1
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    served_model_name: str = "model"
    max_waiting: int = 256
    max_connections: int | None = None
    max_model_len: int | None = None
    max_body_bytes: int = 4 * 2**20
    timeout_s: float = 30.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        problems = Problems()

        def check(name: str, fits: bool, expected: str) -> None:
            problems.expect(fits, name, expected, getattr(self, name))

        def is_whole(value: object, low: int, high: float = float("inf")) -> bool:
            return is_integer(value) and low <= value <= high  # type: ignore[operator]

        check("host", isinstance(self.host, str) and bool(self.host), "an address, such as 127.0.0.1")
        check("port", is_whole(self.port, 0, 65535), "a whole number in 0..65535")
        if self.api_key is not None and not (
            isinstance(self.api_key, str) and self.api_key.isascii() and self.api_key.strip() == self.api_key
            and self.api_key
        ):  # fmt: skip
            problems.add("api_key must be a text of ASCII characters without spaces around it, or None")
        name = self.served_model_name
        check("served_model_name", isinstance(name, str) and bool(name), "a text, not empty")
        check("max_waiting", is_whole(self.max_waiting, 0), "a whole number, 0 or more")
        most = self.max_connections
        check("max_connections", most is None or is_whole(most, 1), "a whole number, 1 or more, or None")
        length = self.max_model_len
        check("max_model_len", length is None or is_whole(length, 2), "a whole number, 2 or more, or None")
        check("max_body_bytes", is_whole(self.max_body_bytes, 1), "1 or more")
        check("timeout_s", is_number(self.timeout_s) and self.timeout_s > 0, "seconds, more than 0")
        check("drain_s", is_number(self.drain_s) and self.drain_s >= 0, "seconds, 0 or more")
        problems.raise_any()
