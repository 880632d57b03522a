"""Folders behind HTTP or S3, as far as reading OME-Zarr needs them."""

import os
import re
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from muvit.errors import ReadError, first_line

_URL = re.compile(r"(https?|s3):/+(?=.)")
_TIMEOUT_S = 60.0
_RETRIES = {"max_retries": 4, "initial_delay": "0.2s", "max_delay": "4s"}


class RemotePath(PurePosixPath):
    """Address of a file or folder, with those methods of `pathlib.Path` that reading takes.

    A request that fails is repeated up to four times; one that takes longer than a minute in all is given up.
    """

    def __str__(self) -> str:
        return _URL.sub(r"\1://", super().__str__(), count=1)

    def resolve(self) -> "RemotePath":
        """The address itself."""
        return self

    def is_file(self) -> bool:
        """Whether there is a file.

        Raises:
            ReadError: the server does not answer.
        """
        return self._read() is not None

    def read_text(self, encoding: str = "utf-8") -> str:
        """Content of the file.

        Raises:
            ReadError: the server does not answer.
            FileNotFoundError: there is none.
        """
        content = self._read()
        if content is None:
            raise FileNotFoundError(f"{self} is not there")
        return content.decode(encoding)

    @property
    def store(self) -> dict[str, Any]:
        """Specification of the folder as a key-value store of tensorstore.

        Requests to S3 are signed if the environment or the home folder hold credentials, and go to
        ``AWS_ENDPOINT_URL`` if that is set.
        """
        scheme, host, *rest = self.parts
        path = "".join(f"{part}/" for part in rest)
        if scheme != "s3:":
            return {"driver": "http", "base_url": f"{scheme}//{host}", "path": f"/{path}"}
        store: dict[str, Any] = {"driver": "s3", "bucket": host, "path": path}
        if "AWS_ENDPOINT_URL" in os.environ:
            store["endpoint"] = os.environ["AWS_ENDPOINT_URL"]
            store["aws_region"] = os.environ.get("AWS_REGION", "us-east-1")
        known = "AWS_ACCESS_KEY_ID" in os.environ or Path("~/.aws").expanduser().is_dir()
        return store if known else store | {"aws_credentials": {"type": "anonymous"}}

    def _read(self) -> bytes | None:
        import tensorstore

        parent = self.parent
        assert isinstance(parent, RemotePath)
        store = wait_for(tensorstore.KvStore.open(parent.store, context=remote_context()), parent)
        found = wait_for(store.read(self.name), self)
        return bytes(found.value) if found.state == "value" else None


def as_remote(path: str | Path | RemotePath) -> RemotePath | None:
    """The address that a path is, also one that `pathlib.Path` has normalised; None if it is none."""
    return RemotePath(str(path)) if _URL.match(str(path)) else None


def wait_for(future: Any, subject: Path | RemotePath) -> Any:
    """Result of a request of tensorstore.

    Raises:
        ReadError: it is one to a server that fails or does not answer in time.
    """
    if not isinstance(subject, RemotePath):
        return future.result()
    try:
        return future.result(timeout=_TIMEOUT_S)
    except (ValueError, OSError, RuntimeError) as error:
        got = f"none within {_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else first_line(error)
        hint = "Check the address and the connection and repeat the command, or download the store."
        raise ReadError(subject, expected="an answer of the server", got=got, hint=hint) from error


@cache
def remote_context() -> Any:
    """Limits of requests and caches for the whole process."""
    import tensorstore

    return tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": 256 << 20},
            "http_request_retries": _RETRIES,
            "s3_request_retries": _RETRIES,
        }
    )
