"""Data on an object store (``s3://``, ``gs://``, ``ais://``, ``msc://``), through Energon's multi-storage-client.

Credentials and endpoints are those of its own configuration, or of the store's usual environment variables.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from megavlm.config.errors import MachineError, MissingFileError, UserError
from megavlm.data.formats.base import BrokenError, is_inside
from megavlm.data.machine import is_local_fault

SCHEMES = ("s3", "gs", "ais", "msc")
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_EXTRAS = {"boto3": "s3", "google": "gcs"}
_ABSENT = ("NoSuchBucket", "NoSuchKey", "404")


def is_url(text: str) -> bool:
    """Whether it is the URL of an object store.

    Raises:
        UserError: It is a URL that is not read.
    """
    found = _URL.match(text)
    if found is None:
        return False
    if found[1].lower() not in SCHEMES:
        raise UserError(f"{text}: {found[1]}:// is not read; take a path, or {', '.join(f'{s}://' for s in SCHEMES)}")
    return True


class Store:
    """A place on an object store: an object, or all that begins with its path.

    Args:
        url: Its URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._client: Any = None
        self._path = ""

    @property
    def folder(self) -> str:
        """URL of where this lies, for what is called as a data file is; else its own."""
        parent, _, name = self.url.rpartition("/")
        return parent if is_data(name) else self.url

    def listing(self) -> list[tuple[str, int, str]]:
        """Return path from here, size and version of each object, by path; of an object itself, its name.

        Raises:
            MissingFileError: There is nothing.
            UserError, MachineError: The store refuses, or is not reached.
        """
        try:
            client = self._opened()
            found = [] if self._is_prefix(client) else [client.info(self._path, strict=False)]
            found = found or list(client.list_recursive(path=self._at("")))
        except Exception as error:
            raise self._told(error) from error
        base = self._path if len(found) != 1 or found[0].key != self._path else str(PurePosixPath(self._path).parent)
        items = [
            (one.key[len(base) :].lstrip("/") if base != "." else one.key, int(one.content_length),
             one.etag or str(one.last_modified))
            for one in found if not one.key.endswith("/")
        ]  # fmt: skip
        if not items:
            raise MissingFileError(f"{self.url}: there is nothing at this URL")
        return sorted(items)

    def fetch(self, directory: Path) -> Path:
        """Fetch the object, or the data files among all objects here, into a directory; return the file, or directory.

        Raises:
            MissingFileError: There is nothing.
            UserError, MachineError: As :meth:`listing`.
        """
        items = self.listing()
        one = len(items) == 1 and items[0][0] == self.url.rpartition("/")[2]
        for name, _, _ in items:
            if not is_inside(name):
                raise UserError(f"{self.url}: an object is called {name!r}; rename it")
            if not one and not is_data(name):
                continue
            file = directory / name
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._opened().download_file(self._path if one else self._at(name), str(file))
            except Exception as error:
                raise self._told(error) from error
        directory.mkdir(exist_ok=True)
        return directory / items[0][0] if one else directory

    def has(self, path: str) -> bool:
        """Whether there is an object at a path from here.

        Raises:
            UserError, MachineError: The store refuses, or is not reached.
        """
        try:
            client = self._opened()
            return bool(client.is_file(self._at(path)))
        except FileNotFoundError:
            return False
        except Exception as error:
            raise self._told(error) from error

    def read(self, path: str, most: int, what: str = "image") -> bytes:
        """Return the object at a path from here, of at most ``most`` bytes; messages call it ``what``.

        Raises:
            BrokenError: There is none, or it is larger.
            UserError, MachineError: As :meth:`has`.
        """
        try:
            client = self._opened()
            data = bytes(client.read(self._at(path)))
        except FileNotFoundError:
            raise BrokenError(f"{what} missing", f"no {what} {path!r} in {self.url}") from None
        except Exception as error:
            raise self._told(error) from error
        if len(data) > most:
            raise BrokenError(f"bad {what} (too large)", f"{what} {path!r} has {len(data):,} bytes, at most {most:,}")
        return data

    def _opened(self) -> Any:
        if self._client is None:
            import multistorageclient  # noqa: PLC0415 - slow to import, and few need it

            self._client, path = multistorageclient.resolve_storage_client(self.url)
            self._path = path.strip("/")
        return self._client

    def _at(self, name: str) -> str:
        """Return the path of an object below this place, which may be the bucket itself."""
        return f"{self._path}/{name}" if self._path else name

    def _is_prefix(self, client: Any) -> bool:
        return not self._path or not client.is_file(self._path)

    def _told(self, error: Exception) -> Exception:
        """Return what is told of an error of the client."""
        if isinstance(error, UserError | MachineError) or is_local_fault(error):
            return error
        line = " ".join(str(error).split())
        if isinstance(error, ImportError):
            package = (error.name or "").split(".")[0]
            extra = _EXTRAS.get(package)
            remedy = f"pip install 'megavlm[{extra}]'" if extra else f"pip install {package}"
            return UserError(f"{self.url}: the client for it is not installed ({line}); {remedy}")
        if isinstance(error, FileNotFoundError) or any(sign in line for sign in _ABSENT):
            return MissingFileError(f"{self.url}: there is nothing at this URL ({line})")
        if isinstance(error, PermissionError | ValueError) or "denied" in line.lower() or "credential" in line.lower():
            return UserError(f"{self.url}: {line}; check the URL, and the credentials of this process")
        return MachineError(f"{self.url}: {type(error).__name__}: {line}")


def is_data(name: str) -> bool:
    """Whether a file of a folder is data, not a picture."""
    return name.endswith((".json", ".jsonl", ".parquet", ".arrow", ".tar", ".tar.gz", ".tgz"))
