"""A web server with pictures, and with what a server of pictures may do wrong."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

REDIRECTS = {
    "/moved": "http://pictures.example/a.png",
    "/to-loopback": "http://loopback.example/a.png",
    "/to-address": "http://169.254.169.254/latest/meta-data",
    "/to-itself": "http://rebinding.example/a.png",
    "/to-file": "file:///etc/passwd",
}


def _picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 99, 199)).save(out, "PNG")
    return out.getvalue()


class _Handler(BaseHTTPRequestHandler):
    picture = _picture()

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):  # the client has left
            if self.path in REDIRECTS:
                self.send_response(302)
                self.send_header("Location", REDIRECTS[self.path])
                self.end_headers()
                return
            self.send_response(404 if self.path == "/absent" else 200)
            self.end_headers()
            if self.path == "/slow":
                for _ in range(300):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            elif self.path == "/padded":  # a picture as far as decoders look
                self.wfile.write(self.picture + b" " * 700_000)
            else:
                self.wfile.write({"/big": b"x" * (2 << 20), "/text": b"no picture"}.get(self.path, self.picture))

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def web_server() -> Iterator[int]:
    """Serve on a port of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running.server_address[1]
        running.shutdown()
        thread.join()
