"""A folder: a path, or behind an address (http, s3 and others, by fsspec), where transient faults are tried again."""

import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from coadvise.errors import StorageError, UserError

T = TypeVar("T")
Beat = Callable[[], None]  # called while something takes long

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between attempts, each drawn from half to one and a half of this
FIRST_WAITS = WAITS[:3]  # before anything has been read: the address is probably wrong
SILENCE = 20  # seconds without an answer, less than `data.workers.PATIENCE`
_FORBIDDEN, _NOT_WRITTEN = (401, 403), (405, 501)  # of HTTP
_REFUSED = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "UnauthorizedSSOTokenError")


def _nothing() -> None:
    """For work that nobody waits for."""


@dataclass(frozen=True)
class Place:
    """A folder.

    Attributes:
        url: a path, or PROTOCOL://PATH.
    """

    url: str

    @property
    def local(self) -> Path | None:
        """The folder itself, where its files are this machine's."""
        protocol, found, path = self.url.partition("://")
        return Path(self.url) if not found else Path(path) if protocol in ("file", "local") else None

    def read(
        self, name: str, start: int = 0, stop: int | None = None, beat: Beat = _nothing, waits: tuple[float, ...] = ()
    ) -> bytes:
        """A file, or bytes start..stop-1 of it; nothing beyond its end. A server that knows no ranges gives all.

        Args:
            waits: seconds between attempts; `WAITS` if empty.

        Raises:
            FileNotFoundError, PermissionError: at once.
            StorageError: every attempt failed.
        """
        bounds = {} if stop is None else {"start": start, "end": stop}

        def call(files: Any, root: str) -> bytes:
            try:
                return files.cat_file(f"{root}/{name}", **bounds)
            except Exception as error:
                if _beyond(error):
                    return b""
                raise

        return self._tried(call, name, beat, waits or WAITS)

    def write(self, name: str, content: bytes) -> None:
        """Writes or replaces a file, whole or not at all. Raises as `read`."""
        if (folder := self.local) is None:
            self._tried(lambda files, root: files.pipe_file(f"{root}/{name}", content), name, _nothing, WAITS)
            return
        path = folder / name
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
        except PermissionError:
            raise
        except OSError as error:
            raise StorageError(_failed(f"'{path}'", "written", error)) from None
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there. Raises as `read`."""
        try:
            self._tried(lambda files, root: files.rm_file(f"{root}/{name}"), name, _nothing, WAITS)
        except FileNotFoundError:
            return

    def names(self, folder: str) -> set[str]:
        """The names of the files in a folder, which need not exist. Raises as `read`."""
        try:
            found = self._tried(
                lambda files, root: files.ls(f"{root}/{folder}", detail=False, refresh=True), folder, _nothing, WAITS
            )
        except FileNotFoundError:
            return set()
        return {str(path).rstrip("/").rpartition("/")[2] for path in found}

    def _tried(self, call: Callable[[Any, str], T], name: str, beat: Beat, waits: tuple[float, ...]) -> T:
        for wait in (*(waits if self.local is None else ()), None):
            beat()
            try:
                return call(*_file_system(os.getpid(), self.url))
            except (FileNotFoundError, PermissionError, UserError):
                raise
            except Exception as error:  # of many kinds, from several packages
                status = getattr(error, "status", None)  # of HTTP
                if status in _FORBIDDEN or type(error).__name__ in _REFUSED:
                    raise PermissionError(reason(error)) from None
                if status in _NOT_WRITTEN or isinstance(error, NotImplementedError):  # fsspec's, of http
                    raise PermissionError("such an address can only be read") from None
                if wait is None:
                    raise StorageError(_failed(f"'{self.url}/{name}'", "reached", error)) from None
            until = time.monotonic() + wait * (0.5 + random.random())
            while time.monotonic() < until:
                time.sleep(min(0.5, wait))
                beat()
        raise AssertionError


def _beyond(error: Exception) -> bool:
    """Whether a server was asked for bytes behind a file's end."""
    return getattr(error, "status", None) == 416 or "range is not satisfiable" in str(error).lower()


def reason(error: Exception) -> str:
    """Why, in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _failed(what: str, done: str, error: Exception) -> str:
    return f"{what} cannot be {done}: {reason(error)}; once it can, run the same command again to go on"


@cache
def _file_system(process: int, url: str) -> tuple[Any, str]:
    """fsspec's object for an address, and the address's path there. One a process: its connections cannot be shared.

    Raises:
        UserError: an unknown protocol, or one whose package is missing.
    """
    import fsspec

    protocol = url.partition("://")[0] if "://" in url else "file"
    options: dict[str, Any] = {"skip_instance_cache": True} if protocol != "memory" else {}
    if protocol in ("s3", "s3a"):
        quiet = {"connect_timeout": SILENCE / 2, "read_timeout": SILENCE, "retries": {"total_max_attempts": 1}}
        options |= {"config_kwargs": quiet, "use_listings_cache": False}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=SILENCE / 2, sock_read=SILENCE)}
        files, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(
            f"'{url}' needs a package that is not there ({reason(error)}): pip install 'coadvise[shards]' for s3 and "
            "http; for others the package that fsspec names"
        ) from None
    except ValueError as error:
        raise UserError(
            f"'{url}' is no address of shards: {reason(error)}; give a path, s3://BUCKET/PATH or http://HOST/PATH"
        ) from None
    files.retries = 1  # s3fs would try again itself, each of our times
    return files, str(root).rstrip("/")
