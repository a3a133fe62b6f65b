"""Bearer tokens: the file that the server reads, which holds a salted hash of each, and how a token is found in it.

A token is 32 random bytes, so its hash cannot be guessed back however fast it is computed: one SHA-256 over salt and
token is enough, where a password that a person chose would need scrypt and its cost on every call. `vaeserve-server
token add` makes tokens, and nothing else should.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from vaeserve.v1 import vae_pb2
from vaeserve_server.errors import TokensError

PREFIX = "vaeserve_"
"""Of every token, so that people and scanners for secrets know one when they see it."""

_SERVICE = vae_pb2.DESCRIPTOR.services_by_name["VaeService"]
SHORT_NAMES = tuple(method.name for method in _SERVICE.methods)
"""The methods that a file may name without their service."""

_SECRET_BYTES, _SALT_BYTES = 32, 16
_MAX_CHARACTERS = 200  # of a token; nobody makes the server hash more
_MAX_TOKENS = 1000  # each is tried for a token that is not known yet
_HASH_PATTERN = rf"^sha256\$[0-9a-f]{{{2 * _SALT_BYTES}}}\$[0-9a-f]{{64}}$"
_SHORT_PATTERN = "|".join(SHORT_NAMES)
_RPC_PATTERN = rf"^(\*|{_SHORT_PATTERN}|[A-Za-z_][\w.]*/(\*|[A-Za-z_]\w*))$"

_log = logging.getLogger(__name__)


class Token(BaseModel):
    """One token, without its secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[\w.@-]{1,64}$")]
    hash: Annotated[str, StringConstraints(pattern=_HASH_PATTERN)]
    rpcs: Annotated[tuple[Annotated[str, StringConstraints(pattern=_RPC_PATTERN)], ...], Field(min_length=1)]
    created: AwareDatetime | None = None
    expires: AwareDatetime | None = None

    def allows(self, method: str) -> bool:
        """Return whether the token is for `method`, as in "vaeserve.v1.VaeService/Encode"."""
        service = method.partition("/")[0]
        full = {f"{_SERVICE.full_name}/{rpc}" if rpc in SHORT_NAMES else rpc for rpc in self.rpcs}
        return not full.isdisjoint({"*", method, f"{service}/*"})

    def is_of(self, secret: bytes) -> bool:
        """Return whether this is the token with this secret, in a time that does not tell how nearly."""
        _, salt, digest = self.hash.split("$")
        return hmac.compare_digest(_digest(bytes.fromhex(salt), secret), digest)


class TokenFile(BaseModel):
    """All of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    tokens: Annotated[tuple[Token, ...], Field(max_length=_MAX_TOKENS)] = ()

    @model_validator(mode="after")
    def _refuse_names_twice(self) -> TokenFile:
        names = [token.name for token in self.tokens]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tokens have the name {name}")
        return self


class Tokens:
    """The tokens of one file. `use` what was read before anything else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: tuple[Token, ...] = ()
        # What was found once is found again by one keyed hash. Only valid tokens get in, so this stays as small as the
        # file; the key is this process's own, so that nobody can aim at the time that a look-up takes.
        self._found: dict[bytes, Token] = {}
        self._key = secrets.token_bytes(32)

    def use(self, file: TokenFile) -> None:
        """Take these tokens and no others from now on. Call it where `find` is called: on the event loop."""
        self.tokens, self._found = file.tokens, {}
        now = datetime.now(UTC)
        for token in self.tokens:
            if token.expires and token.expires <= now:
                _log.warning("a token has expired", extra={"fields": {"token": token.name}})
        if not self.tokens:
            _log.warning("no tokens: nobody may call until there is one", extra={"fields": {"file": str(self.path)}})

    def find(self, given: str) -> Token | None:
        """Return the token that was given, None if there is no such token or its time is over."""
        if len(given) > _MAX_CHARACTERS:
            return None
        secret = given.encode()
        key = hashlib.blake2b(secret, key=self._key, digest_size=32).digest()
        token = self._found.get(key)
        if token is None:
            matching = [token for token in self.tokens if token.is_of(secret)]  # all of them, whichever it is
            if not matching:
                return None
            token = self._found[key] = matching[0]
        return None if token.expires and token.expires <= datetime.now(UTC) else token


def make(name: str, rpcs: tuple[str, ...], expires: datetime | None) -> tuple[str, Token]:
    """Return a new token's secret, to be told once, and what to keep of it. ValidationError for a wrong name or RPC."""
    secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    salt = secrets.token_bytes(_SALT_BYTES)
    hashed = f"sha256${salt.hex()}${_digest(salt, secret.encode())}"
    created = datetime.now(UTC).replace(microsecond=0)
    return secret, Token(name=name, hash=hashed, rpcs=rpcs, created=created, expires=expires)


def read(path: Path) -> TokenFile:
    """Return what a file holds; TokensError, which repeats none of it, if that is no file of tokens."""
    try:
        return TokenFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise TokensError(path, f"it cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise TokensError(path, problem(error)) from None


def problem(error: ValidationError) -> str:
    """Return what is wrong with tokens in words that hold nothing of them: a secret may stand where a name should."""
    details = error.errors(include_input=False)
    told = [detail for detail in details if detail["type"] != "too_short"] or details  # short for want of good ones
    told.sort(key=lambda detail: detail["type"] == "missing")  # what is there and wrong says more
    return "; ".join(f"{_place(detail)}: {_words(detail)}" for detail in told[:3])


def _place(detail: ErrorDetails) -> str:
    known = Token.model_fields.keys() | TokenFile.model_fields.keys()
    steps = [f"[{step}]" if isinstance(step, int) else step if step in known else "?" for step in detail["loc"]]
    return ".".join(steps).replace(".[", "[") or "it"


def _words(detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return "it is missing"
    if detail["loc"][-2:-1] == ("rpcs",) and detail["type"] == "string_pattern_mismatch":
        return f"an RPC is one of {', '.join(SHORT_NAMES)}, or package.Service/Method, package.Service/* or *"
    if detail["loc"][-1:] == ("name",):
        return "a name is 1 to 64 letters, digits and . _ - @"
    if detail["loc"][-1:] == ("hash",):
        return "a hash is as `vaeserve-server token add` writes it; a token itself never stands in this file"
    words = detail["msg"].removeprefix("Value error, ")
    return words[0].lower() + words[1:]


def _digest(salt: bytes, secret: bytes) -> str:
    return hashlib.sha256(salt + secret).hexdigest()
