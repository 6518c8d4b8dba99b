"""An S3 server on loopback, in a process of its own, that can be slow, faulty, and counts.

moto answers the requests. Before it stands a WSGI layer that waits, and that fails reads
with a given probability by a seeded draw. `python tests/s3_server.py` is the process; `S3Server`
starts it. werkzeug closes every connection after its answer, so that each request also connects.
"""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

KEY, SECRET = "test-key", "test-secret"
FAULTS = ("500", "503", "dropped", "truncated", "long")
"""Answers of a faulty read: two statuses, a dropped connection, a body cut off, and a
Content-Length longer than the body."""
CONTROL = "/_control"


class S3Server:
    """The server's process; use it as a context manager."""

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        return self

    def __exit__(self, *exception):
        self.kill()

    @property
    def environment(self):
        """Environment variables with which any S3 client finds it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def set(self, *, latency=0.0, failures=0.0, faults=FAULTS, stall=5.0, seed=0, bandwidth=None):
        """What happens from now on, and counts from zero.

        Args:
            latency: seconds before every answer.
            failures: share of reads that fail.
            faults: kinds of failures, of FAULTS or "stall".
            stall: seconds that a stalled answer takes.
            seed: of the draw.
            bandwidth: bytes a second of all answers together; None: as fast as it goes.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        request = urllib.request.Request(self.url + CONTROL, json.dumps(arguments).encode())
        urllib.request.urlopen(request, timeout=10).close()

    def counts(self):
        """Since `set`: `requests`, `bytes` sent, each `fault ...`, and each `path range`."""
        with urllib.request.urlopen(self.url + CONTROL, timeout=10) as answer:
            return Counter(json.load(answer))

    def kill(self):
        """Ends the process at once."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def client(self):
        """A boto3 client of this server."""
        import boto3

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )

    def upload(self, folder, bucket, prefix):
        """Copies a folder into a bucket, which is made; returns its URL."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder).as_posix()}"
                client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
        return f"s3://{bucket}/{prefix}"


class FaultyLayer:
    """WSGI application around moto's."""

    def __init__(self, application):
        self.application = application
        self.lock = threading.Lock()
        self.configure({"latency": 0.0, "failures": 0.0, "bandwidth": None})

    def configure(self, settings):
        self.settings = settings
        self.free_at = 0.0  # of the wire
        self.random = random.Random(settings.get("seed", 0))
        self.counts = Counter()

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] == CONTROL:
            return self.control(environ, start_response)
        settings = self.settings
        time.sleep(settings["latency"])
        reading = environ["REQUEST_METHOD"] == "GET"
        with self.lock:
            fault = None
            if reading and self.random.random() < settings["failures"]:
                fault = self.random.choice(settings["faults"])
            asked = f"{environ['PATH_INFO']} {environ.get('HTTP_RANGE', '')}"
            self.counts.update(["requests", asked, f"fault {fault}"])
        if f"Credential={KEY}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            return refuse(start_response, "403 Forbidden", "InvalidAccessKeyId")
        if fault == "500":
            return refuse(start_response, "500 Internal Server Error", "InternalError")
        if fault == "503":
            return refuse(start_response, "503 Slow Down", "SlowDown")
        if fault == "dropped":
            drop(environ)
        if fault == "stall":
            time.sleep(settings["stall"])
        return self.answer(environ, start_response, fault)

    def answer(self, environ, start_response, fault):
        """moto's answer, cut or with a wrong length if `fault` says so."""
        status, headers, body = collect(self.application, environ)
        with self.lock:
            self.counts["bytes"] += len(body)
        if bandwidth := self.settings["bandwidth"]:
            for start in range(0, len(body), part := max(4096, int(bandwidth / 100))):
                self.send(min(part, len(body) - start) / bandwidth)
        if fault == "long":
            headers = [(k, v) for k, v in headers if k.lower() != "content-length"]
            headers.append(("Content-Length", str(len(body) + 7)))
        start_response(status, headers)
        if fault in ("truncated", "long"):
            yield body[: len(body) // 2] if fault == "truncated" else body
            drop(environ)
        yield body

    def send(self, seconds):
        """Waits while the wire carries what came before this, and then this.

        First come, first served: with a lock, the answer that has just sent a part would send its
        next one as well, and a small answer would wait for large ones until its client gives up.
        """
        with self.lock:
            self.free_at = end = max(self.free_at, time.monotonic()) + seconds
        time.sleep(max(0.0, end - time.monotonic()))

    def control(self, environ, start_response):
        if environ["REQUEST_METHOD"] == "POST":
            length = int(environ["CONTENT_LENGTH"])
            self.configure(json.loads(environ["wsgi.input"].read(length)))
        with self.lock:
            content = json.dumps(self.counts).encode()
        start_response("200 OK", [("Content-Length", str(len(content)))])
        return [content]


def collect(application, environ):
    """Runs a WSGI application to its end: status, headers, body."""
    started = []
    chunks = application(environ, lambda status, headers, *_: started.append((status, headers)))
    return *started[0], b"".join(chunks)


def refuse(start_response, status, code):
    """An S3 error document."""
    content = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))]
    start_response(status, headers)
    return [content]


def drop(environ):
    """Ends the connection after what was sent."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError("injected")


def end_with_parent():
    """Ends this process when the one that started it has gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def main():
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").disabled = True
    application = FaultyLayer(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=end_with_parent, daemon=True).start()
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
