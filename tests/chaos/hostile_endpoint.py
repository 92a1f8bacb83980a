"""A reward endpoint that answers every request with one kind of bomb. Run by path; needs only the standard library.

Arguments: the kind (a key of ANSWERS) and a seed. Prints its port; ends when its standard input closes.
"""

from __future__ import annotations

import gzip
import random
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping

MIB = 1 << 20
_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_SLOW_S = 0.05

Answer = Callable[[random.Random], Iterator[bytes]]


def _sized(body: bytes, headers: bytes = b"") -> Iterator[bytes]:
    yield _OK + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _endless(part: bytes, start: bytes = b"", pause_s: float = 0.0) -> Iterator[bytes]:
    yield start
    while True:
        yield part
        time.sleep(pause_s)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def packed(choose: random.Random) -> Iterator[bytes]:
    name, pack = choose.choice(
        (
            (b"gzip", gzip.compress),
            (b"deflate", zlib.compress),
            (b"br", gzip.compress),
            (b"gzip, gzip", lambda data: gzip.compress(gzip.compress(data))),
        )
    )
    block = choose.choice((bytes(MIB), b"[" * MIB, b"9" * MIB, b'{"rewards": [' + b"1," * MIB))
    count = choose.choice((1, 20, 300))
    body = pack(block) * count if choose.random() < 0.5 else pack(block * min(count, 60))
    return _sized(body, b"Content-Encoding: %s\r\n" % name)


def endless_body(choose: random.Random) -> Iterator[bytes]:
    chunked = _OK + b"Transfer-Encoding: chunked\r\n\r\n"
    unpacks = zlib.compressobj(wbits=31)
    packed_start = unpacks.compress(b" " * MIB) + unpacks.flush(zlib.Z_SYNC_FLUSH)
    status = choose.choice((b"200 OK", b"404 Not Found", b"500 Internal Server Error", b"503 Busy"))
    return choose.choice(
        (
            lambda: _endless(bytes(MIB), _OK + b"\r\n"),
            lambda: _endless(bytes(MIB), _OK + b"Content-Length: 1000000000000000\r\n\r\n"),
            lambda: _endless(_chunk(b" " * 60_000), chunked),
            lambda: _endless(_chunk(b""), chunked),
            lambda: _endless(b"1;" + b"x" * 4096, chunked),
            lambda: _endless(b"f", chunked),
            lambda: _endless(b"x: y\r\n", chunked + b"0\r\n"),
            lambda: _endless(packed_start, _OK + b"Content-Encoding: gzip\r\n\r\n"),
            lambda: _endless(b"x" * 60_000, b"HTTP/1.1 %s\r\n\r\n" % status),
        )
    )()


def slow(choose: random.Random) -> Iterator[bytes]:
    return choose.choice(
        (
            lambda: _endless(b"", pause_s=1.0),
            lambda: _endless(b"1", _OK + b"\r\n", _SLOW_S),
            lambda: _endless(b"x", b"HTTP/1.1 200 ", _SLOW_S),
            lambda: _endless(b"a: b\r\n", _OK, _SLOW_S),
            lambda: _endless(_chunk(b" "), _OK + b"Transfer-Encoding: chunked\r\n\r\n", _SLOW_S),
            lambda: _endless(b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=_SLOW_S),
        )
    )()


def heads(choose: random.Random) -> Iterator[bytes]:
    return choose.choice(
        (
            lambda: _endless(b"x" * 60_000, b"HTTP/1.1 200 "),
            lambda: _endless(b"a: b\r\n" * 10_000, _OK),
            lambda: _endless(b"x" * 60_000, _OK + b"a: "),
            lambda: _endless(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 100),
            lambda: iter([b"HTTP/1.1 302 Found\r\nLocation: /score\r\nContent-Length: 0\r\n\r\n"]),
            lambda: iter([b"HTTP/1.1 302 Found\r\nLocation: http://[" + b"x" * 60_000 + b"\r\n\r\n"]),
            lambda: iter([b"HTTP/1.1 99999999999999999999 OK\r\n\r\n"]),
            lambda: iter([b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}"]),
            lambda: iter([b"\0" * 100_000]),
            lambda: iter([b""]),
        )
    )()


def numbers(choose: random.Random) -> Iterator[bytes]:
    count = choose.choice((1000, 100_000, 900_000))
    value = choose.choice(
        (
            b"9" * count,
            b"-" + b"9" * count,
            b"0." + b"9" * count,
            b"1e" + b"9" * min(count, 4000),
            b"[" * count,
            b"[" * count + b"]" * count,
            b'{"a":' * (count // 5),
            b'"' + b"\\u0000" * (count // 6) + b'"',
            b"{" + b",".join(b'"k%d":1' % number for number in range(count // 10)) + b"}",
            b"NaN",
            b"Infinity",
        )
    )
    return _sized(
        choose.choice((b'{"rewards": [%s, 1]}', b'{"rewards": %s}', b"%s", b'{"x": %s, "rewards": [1, 1]}')) % value
    )


ANSWERS: Mapping[str, Answer] = {
    "packed": packed,
    "endless body": endless_body,
    "slow": slow,
    "heads": heads,
    "numbers": numbers,
}


def _answer(connection: socket.socket, parts: Iterator[bytes]) -> None:
    with connection:
        try:
            connection.recv(MIB)
            for part in parts:
                connection.sendall(part)
        except OSError:
            return


def main() -> None:
    kind, seed = sys.argv[1:]
    with socket.create_server(("127.0.0.1", 0)) as server:
        sys.stdout.write(f"{server.getsockname()[1]}\n")
        sys.stdout.flush()

        def serve() -> None:
            while True:
                connection, _ = server.accept()
                parts = ANSWERS[kind](random.Random(seed))
                threading.Thread(target=_answer, args=(connection, parts), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        sys.stdin.read()


if __name__ == "__main__":
    main()
