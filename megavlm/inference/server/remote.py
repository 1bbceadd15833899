"""Pictures from elsewhere: http(s) URLs of public addresses, within a size and a time.

A name is resolved once, all its addresses are checked, and the connection goes to one that was checked: a name that
says something else the next moment ("DNS rebinding") reaches nothing. The same holds for every redirect.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

_REDIRECTS = 3
_CHUNK = 1 << 16

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class RemoteError(ValueError):
    """A picture that is not fetched; the text says why."""


def is_public(address: Address) -> bool:
    """Whether an address belongs to the open internet, also one that is wrapped in an IPv6 address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None or address in ipaddress.ip_network("64:ff9b::/96"):
            return False
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def fetch(url: str, *, limit: int, seconds: float, allowed: Callable[[Address], bool] = is_public) -> bytes:
    """Return what lies at a URL.

    Args:
        url: http or https.
        limit: most bytes.
        seconds: for all of it, redirects included.
        allowed: which addresses may be asked.

    Raises:
        RemoteError: the URL, an address, the answer, its size or the time is not as it must be.
    """
    deadline = time.monotonic() + seconds
    for _ in range(_REDIRECTS + 1):
        answer = _get(url, limit, deadline, allowed)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise RemoteError(f"more than {_REDIRECTS} redirects")


def _get(url: str, limit: int, deadline: float, allowed: Callable[[Address], bool]) -> bytes | str:
    """Return the bytes at ``url``, or where it sends us."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise RemoteError("only http and https URLs without user names are fetched")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise RemoteError("the URL's port is no number") from None
    address = _resolve(parts.hostname, port, allowed)
    left = deadline - time.monotonic()
    if left <= 0:
        raise RemoteError("it took too long")
    connection = _Pinned(parts.hostname, port, address, parts.scheme == "https", left)
    # A socket's own time-out begins anew with every byte.
    watch = threading.Timer(left, connection.cut)
    watch.daemon = True
    watch.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return response.getheader("Location") or ""
        if response.status != 200:
            raise RemoteError(f"the other server answered {response.status}")
        data = bytearray()
        while chunk := response.read(_CHUNK):
            data += chunk
            if len(data) > limit:
                raise RemoteError(f"larger than {limit >> 20} MiB")
        if connection.expired:
            raise RemoteError("it took too long")
        return bytes(data)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        if connection.expired or isinstance(error, TimeoutError):
            raise RemoteError("it took too long") from None
        raise RemoteError(f"no connection or no answer ({type(error).__name__})") from None
    finally:
        watch.cancel()
        connection.close()


def _resolve(host: str, port: int, allowed: Callable[[Address], bool]) -> str:
    """Return an address of a host; all of them must be allowed."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise RemoteError("the host is not known") from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        # A zone ("fe80::1%eth0") belongs to link-local addresses alone.
        if "%" in address or not allowed(ipaddress.ip_address(address)):
            raise RemoteError("the host has a private, local or reserved address")
    return addresses[0]


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, whatever its host's name says by now; the certificate must be the name's."""

    def __init__(self, host: str, port: int, address: str, secure: bool, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        self.address, self.secure, self.expired = address, secure, False

    def connect(self) -> None:
        """Connect to the pinned address."""
        self.sock = socket.create_connection((self.address, self.port), self.timeout)
        if self.secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

    def cut(self) -> None:
        """End it, whatever it is doing."""
        self.expired = True
        if self.sock is not None:
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # not connected yet, or not any more
