"""Pictures from the web, for those who allow it: public addresses only, with limits on size and time.

The name is resolved once, every address it has must be public, and the connection goes to the address that was checked:
a name that answers differently the second time gains nothing. Redirects go through the same checks. Proxies of the
environment are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from megavlm import __version__
from megavlm.config.errors import UserError
from megavlm.data.machine import is_local_fault

MAX_BYTES = 20_000_000
"""Largest picture that is fetched."""
TIMEOUT = 20.0
"""Seconds for one picture, redirects included."""

_MAX_REDIRECTS = 3
_CHUNK = 1 << 16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class FetchError(UserError):
    """A picture that cannot be had; the text says why, on one line."""


def fetch(url: str, *, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT) -> bytes:
    """Return what a URL holds.

    Args:
        url: ``http`` or ``https``.
        max_bytes: Largest answer.
        timeout: Seconds for all of it.

    Raises:
        FetchError: It is no such URL, leads to an address that is not public, or the answer is too large, too late,
            or not 200.
        OSError: This machine has no files, memory or disk left; nothing is wrong with the picture.
    """
    deadline = time.monotonic() + timeout
    here = url
    for _ in range(_MAX_REDIRECTS + 1):
        try:
            answer = _get(here, max_bytes, deadline)
            if isinstance(answer, bytes):
                return answer
            here = urljoin(here, answer)
        except FetchError:
            raise
        except ValueError as error:  # a name that no name server takes, a redirect to no URL, a length of many digits
            raise FetchError(f"{_named(here)}: {_named(str(error))}") from None
    raise FetchError(f"{_named(url)}: more than {_MAX_REDIRECTS} redirects")


def _named(text: str) -> str:
    """Return a URL as a message repeats it: whoever wrote it may have made it very long."""
    return text if len(text) <= 200 else f"{text[:197]}..."


def _get(url: str, max_bytes: int, deadline: float) -> bytes | str:
    """The content, or where a redirect leads."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise FetchError(f"{_named(url)}: not a URL ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError(f"{_named(url)}: only http and https are fetched")
    if parts.username is not None or any(ord(char) <= 32 or ord(char) > 126 for char in url):
        raise FetchError(f"{_named(url)}: has a user name, spaces, or characters that are not ASCII")
    try:
        connection = _connect(parts, port, deadline)
        # The time-out of a socket is one of each read; a server that sends a byte now and then would keep us.
        late = threading.Timer(_left(deadline), _shut, [connection.sock])
        late.daemon = True
        late.start()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"User-Agent": f"megavlm/{__version__}", "Accept": "image/*"})
            response = connection.getresponse()
            location = response.getheader("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                return location
            if response.status != 200:
                raise FetchError(f"{_named(url)}: the server answered {response.status}")
            return _read(url, response, connection, max_bytes, deadline)
        finally:
            late.cancel()
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        if is_local_fault(error):
            raise
        slow = isinstance(error, TimeoutError) or time.monotonic() >= deadline
        what = "took too long" if slow else f"{type(error).__name__}: {error}"
        raise FetchError(f"{_named(url)}: {what}") from None


def _connect(parts: SplitResult, port: int, deadline: float) -> http.client.HTTPConnection:
    """Connect to an address of the host, all of which must be public."""
    host = parts.hostname or ""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if not is_public(address):
            # Not which: a server's answer would tell strangers what names mean inside.
            raise FetchError(f"{_named(parts.geturl())}: {_named(host)} has an address that is not public")
    raw = socket.create_connection((addresses[0], port), timeout=_left(deadline))
    connection = http.client.HTTPConnection(host, port)
    try:
        secure = parts.scheme == "https"
        connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
    except BaseException:
        raw.close()
        raise
    return connection


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public Internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # Those that carry an IPv4 address inside are what that one is.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    site_local = isinstance(ip, ipaddress.IPv6Address) and ip.is_site_local
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or site_local)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _read(
    url: str,
    response: http.client.HTTPResponse,
    connection: http.client.HTTPConnection,
    max_bytes: int,
    deadline: float,
) -> bytes:
    length = response.getheader("Content-Length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise FetchError(f"{_named(url)}: {int(length):,} bytes, at most {max_bytes:,}")
    data = bytearray()
    while True:
        if connection.sock is not None:
            connection.sock.settimeout(_left(deadline))
        chunk = response.read1(_CHUNK)
        if not chunk:
            break
        data += chunk
        if len(data) > max_bytes:
            raise FetchError(f"{_named(url)}: more than {max_bytes:,} bytes")
    if length.isdecimal() and len(data) < int(length):
        raise FetchError(f"{_named(url)}: ended after {len(data):,} of {int(length):,} bytes")
    if time.monotonic() >= deadline:  # cut off by us, which looks like an end
        raise TimeoutError
    return bytes(data)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
