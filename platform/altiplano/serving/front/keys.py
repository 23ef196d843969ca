"""API keys: who calls, and what they may.

The key file holds one JSON object per line; `#` begins a comment line:

    {"name": "web", "sha256": "9f86…", "admin": false, "requests_per_minute": 60,
     "tokens_per_minute": null, "models": ["altiplano"], "expires": "2027-01-01T00:00:00+00:00"}

Only `name` and `sha256` are needed. The file holds hashes, so reading it opens nothing. A plain
SHA-256 is enough: a key is 256 random bits, which no one guesses however fast the hash; slow hashes
are for passwords. Knows nothing of HTTP but its statuses. A look-up costs a microsecond per key.
"""

import hashlib
import hmac
import logging
import math
import os
import secrets
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from altiplano.config.serving import KeySettings
from altiplano.errors import ServeError
from altiplano.serving.front.errors import ApiError
from altiplano.serving.front.limits import Bucket

_log = logging.getLogger("altiplano.keys")
_LOOK_S = 1.0
_PREFIX = "alt-"


class Key(BaseModel):
    """One line of the key file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Whose key it is; shown in logs."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the key's text."""
    admin: bool = False
    """May read metrics and load adapters."""
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    models: list[str] | None = None
    """Names of the models it may use; None is all."""
    expires: AwareDatetime | None = None
    """When it stops opening anything."""


class Caller:
    """Who made a request, for as long as that request lasts.

    Attributes:
        name: the key's; `anonymous` where no key is asked for.
        admin: may use the admin routes.
        charged: tokens of this request so far.
    """

    def __init__(
        self,
        name: str,
        admin: bool,
        models: frozenset[str] | None = None,
        requests: Bucket | None = None,
        tokens: Bucket | None = None,
    ) -> None:
        self.name = name
        self.admin = admin
        self.charged = 0
        self._models = models
        self._requests = requests
        self._tokens = tokens

    def may_use(self, model: str) -> bool:
        """Whether the key opens that model (or adapter)."""
        return self._models is None or model in self._models

    def admit(self) -> None:
        """Count one request. Called once by each route that makes a model work.

        Raises:
            ApiError: 429 with `Retry-After`: the key's requests or tokens of this minute are spent.
        """
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None and (wait := bucket.wait_s(1)) > 0:
                raise ApiError(
                    429,
                    f"key {self.name} may use {bucket.per_minute:g} {what} a minute and has: "
                    f"wait {math.ceil(wait)} s",
                    code="rate_limit_exceeded",
                    kind=what,
                    retry_after_s=wait,
                )
        if self._requests is not None:
            self._requests.take(1)

    def charge(self, tokens: int) -> None:
        """Count tokens of the prompt or of the answer; they may exceed what is left."""
        self.charged += tokens
        if self._tokens is not None:
            self._tokens.take(tokens)


class KeyRing:
    """The keys of a service.

    A file that changed is read within a second; one that cannot be read keeps the keys as they
    were, and says so in the log.

    Args:
        settings: `serve.keys`.
        host: `serve.host`. Without a key file everyone may use the API, and the admin routes answer
            only where the port is bound to loopback: behind a proxy every client looks local.
        shares: HTTP replicas that share the rates: each grants its part of them.
        clock: seconds, never going back.

    Raises:
        ServeError: the file cannot be read or holds no valid keys.
    """

    def __init__(
        self,
        settings: KeySettings,
        host: str = "127.0.0.1",
        shares: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._open_admin = host in ("localhost", "::1", "[::1]") or host.startswith("127.")
        self._shares = shares
        self._clock = clock
        self._looked = clock()
        self._file = Path(settings.file) if settings.file is not None else None
        self._keys: list[tuple[bytes, Key]] = []
        self._buckets: dict[str, tuple[Key, Bucket | None, Bucket | None]] = {}
        if self._file is not None:
            self._state = _state(self._file)
            self._take(read_keys(self._file))
            if self._file.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                _log.warning("others may write %s, and so make keys: chmod go-w", self._file)

    def caller(self, secret: str | None) -> Caller:
        """Who that key belongs to.

        Raises:
            ApiError: 401: no key was given, or none of ours, or one that expired.
        """
        if self._file is None:
            return Caller("anonymous", admin=self._open_admin)
        self._look(self._file)
        if not secret:
            raise ApiError(
                401,
                "no API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="missing_api_key",
            )
        given = hashlib.sha256(secret.encode(errors="surrogateescape")).digest()
        found = None
        for digest, key in self._keys:
            # All are compared, so that the time tells nothing of which one came close.
            if hmac.compare_digest(digest, given):
                found = key
        if found is None:
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")
        if found.expires is not None and found.expires <= datetime.now(UTC):
            raise ApiError(
                401, f"key {found.name} expired at {found.expires}", code="expired_api_key"
            )
        _, requests, tokens = self._buckets[found.sha256]
        models = frozenset(found.models) if found.models is not None else None
        return Caller(found.name, found.admin, models, requests, tokens)

    def _look(self, file: Path) -> None:
        now = self._clock()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        state = _state(file)
        if state == self._state:
            return
        self._state = state
        try:
            self._take(read_keys(file))
        except ServeError as error:
            _log.error("the keys stay as they were: %s", error)
        else:
            _log.info("read %d keys from %s", len(self._keys), file)

    def _take(self, keys: list[Key]) -> None:
        """Hold these keys; a key whose line did not change keeps what is left of its minute."""
        self._keys = [(bytes.fromhex(key.sha256), key) for key in keys]
        kept = self._buckets
        self._buckets = {
            key.sha256: kept[key.sha256]
            if key.sha256 in kept and kept[key.sha256][0] == key
            else (
                key,
                self._bucket(key.requests_per_minute or self._settings.requests_per_minute),
                self._bucket(key.tokens_per_minute or self._settings.tokens_per_minute),
            )
            for key in keys
        }

    def _bucket(self, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        return Bucket(max(1.0, per_minute / self._shares), self._clock)


def read_keys(file: Path) -> list[Key]:
    """The keys in a file.

    Raises:
        ServeError: the file cannot be read, a line is no key (named by number, never quoted), or a
            name or a key stands there twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(
            f"serve.keys.file={file} cannot be read: {error}; make one with "
            f"`altiplano serve-key {file} NAME`"
        ) from None
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key = Key.model_validate_json(line)
        except ValidationError as error:
            what = "; ".join(
                f"{'.'.join(map(str, each['loc'])) or 'line'}: {each['msg']}"
                for each in error.errors(include_input=False)
            )
            raise ServeError(f"{file}, line {number} is no key: {what}") from None
        if any(key.name == other.name or key.sha256 == other.sha256 for other in keys):
            raise ServeError(f"{file}, line {number}: key {key.name} stands there twice")
        keys.append(key)
    return keys


def make_key(
    name: str,
    *,
    admin: bool = False,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    models: list[str] | None = None,
    expires: datetime | None = None,
) -> tuple[str, str]:
    """A new key of 256 random bits.

    Returns:
        The key, to be shown once and kept nowhere, and its line for the file.

    Raises:
        ServeError: a value is not what `Key` takes.
    """
    secret = _PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key(
            name=name,
            sha256=hashlib.sha256(secret.encode()).hexdigest(),
            admin=admin,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            models=models,
            expires=expires,
        )
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise ServeError(f"{first['loc'][0]} of key {name!r}: {first['msg']}") from None
    return secret, key.model_dump_json(exclude_defaults=True)


def add_key(file: Path, name: str, **rights: Any) -> str:
    """Make a key and append its line to a file, which only its owner may read when it is new.

    Args:
        file: made where it is missing.
        name: must not stand there already.
        rights: as `make_key`.

    Returns:
        The key, to be shown once.

    Raises:
        ServeError: as `read_keys` and `make_key`; the name is taken.
    """
    names = [key.name for key in read_keys(file)] if file.exists() else []
    if name in names:
        raise ServeError(
            f"{file} has a key named {name}: choose another name, or remove its line first"
        )
    secret, line = make_key(name, **rights)
    # One write in append mode: a service that reads just now sees the line whole or not at all.
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb") as out:
        unended = file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")
        out.write(b"\n" * unended + line.encode() + b"\n")
    return secret


def _state(file: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
