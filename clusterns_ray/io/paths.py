"""Paths and URLs as users write them: what cannot be meant is refused here, before anything is opened."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote

from clusterns_ray.errors import ConfigError

Named = str | os.PathLike[str]
"""What a path or a name is given as; where several may be, one may be given by itself."""

STORES = ("s3", "gs", "abfs", "abfss")
"""URL schemes of the object stores that are read and written."""
CORPORA = (*STORES, "hf")
"""URL schemes of text to read."""

MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095
"""Linux's limits on one part of a path and on a whole one."""

_PACKAGE = re.compile(r".*/runtime_resources/(?:working_dir|py_modules)_files/[^/]+")
"""Where Ray unpacks what a job brings, on every node."""

_OTHER_NAMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
_WEB = ("http", "https", "ftp")
_KNOWN = {*CORPORA, *_OTHER_NAMES, *_WEB, "file"}
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*)(:/*|/{2,})")
_SECRET_OPTION = re.compile(r"key|secret|token|passw|credential|^sig$|signature", re.IGNORECASE)
_URL_CHARACTERS = r"-._~:/?@!$&'()*+,;=%"
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET",
}
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO (a named pipe)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def names(given: Named | Iterable[Named]) -> tuple[str, ...]:
    """One name, or several, as texts."""
    return tuple(os.fspath(name) for name in ([given] if isinstance(given, str | os.PathLike) else given))


def check_path(key: str, value: Named, schemes: tuple[str, ...] = STORES) -> str:
    """Check one path or URL that a user gave, without touching the file system or the network.

    Args:
        key: the configuration key or command-line option, as messages name it.
        schemes: the URL schemes that may stand here; ``()`` where only a path on this machine makes sense.

    Returns:
        The path or URL. ``file:///a/b`` becomes ``/a/b`` and a URL loses trailing slashes; the rest is as it was given,
        with ``~`` and globs.

    Raises:
        ConfigError: it can name nothing, or it holds credentials, which the message does not repeat.
    """
    text = os.fspath(value)
    if not text.strip():
        raise ConfigError(f"{key} is {text!r}, which names nothing.", "Give a path.")
    odd = next((character for character in text if unicodedata.category(character) in ("Cc", "Cs")), None)
    if odd is not None:
        kind = "a byte that is not UTF-8" if unicodedata.category(odd) == "Cs" else "a control character"
        raise ConfigError(f"{_shown(key, text)} holds {kind}, {odd!a}.", "Rename what it names, or correct the text.")
    url = _SCHEME.match(text)
    scheme = url[1].lower() if url else ""
    if url is None or not (url[2] == "://" or (scheme in _KNOWN and (scheme not in _WEB or url[2] != ":"))):
        _check_local(_shown(key, text), text)
        return text
    rest = text[url.end(1) :].lstrip(":/")
    if scheme == "file":
        return check_path(key, _local_of(_shown(key, text), text, url[2], rest), schemes)
    if scheme in _WEB:
        raise ConfigError(f"{_shown(key, text)} is on the web.", "Download it, and give the path of the file.")
    if scheme not in _KNOWN or _OTHER_NAMES.get(scheme, scheme) not in schemes:
        allowed = ", ".join(f"{name}://" for name in schemes)
        raise ConfigError(
            f"{_shown(key, text)}: {url[1]}:// is not possible here. Give a path on this machine"
            + (f", or a URL of {allowed}." if allowed else ".")
        )
    right = _OTHER_NAMES.get(scheme, scheme)
    if right != "hf" and _has_credentials(right, rest):
        raise ConfigError(
            f"{key} is a URL of {right}:// that holds credentials, which would be written to logs and results.",
            f"Take them out of the URL, and set {_CREDENTIALS[right.removesuffix('s') if right == 'abfss' else right]} "
            "in the environment.",
        )
    if text.startswith(f"{right}:///"):
        raise ConfigError(f"{_shown(key, text)} names no bucket.", f"Write {right}://BUCKET/PATH.")
    if not text.startswith(f"{right}://"):
        raise ConfigError(
            f"{_shown(key, text)} is not a well-formed URL.",
            f"Write {_short(f'{right}://{rest}')!r}, or put ./ before it if it is a file here.",
        )
    if right == "hf":
        _check_lengths(_shown(key, text), rest.split("/"), rest)
        return text
    return _check_store(_shown(key, text), right, text)


def check_regular_file(key: str, path: str | Path, remedy: str = "Give the path of a file.") -> None:
    """Refuse a path that does not lead to a regular file, on which a read could wait for ever.

    Args:
        remedy: what to do where nothing can be read there.

    Raises:
        ConfigError: nothing is there, it may not be looked at, or it is a directory, a FIFO, a device or a socket.
    """
    try:
        mode = os.stat(os.path.expanduser(path)).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{_shown(key, str(path))} cannot be read: {reason}. {remedy}") from None
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        if not stat.S_ISDIR(mode):
            remedy = "Write what it delivers to a file first, and give that."
        raise ConfigError(f"{_shown(key, str(path))} is {kind}, not a regular file. {remedy}")


def job_package(path: str | Path) -> str | None:
    """The copy that Ray made of a job's working directory on this machine, if the path leads into one."""
    package = _PACKAGE.match(os.path.realpath(os.path.expanduser(path)))
    return package[0] if package else None


def check_outlasts_job(key: str, path: str | Path) -> None:
    """Refuse a place for results inside the copy that Ray makes of a job's working directory (``ray job submit
    --working-dir``), in which the job's commands run.

    Raises:
        ConfigError: the path, which may be relative, leads into such a copy.
    """
    package = job_package(path)
    if package is not None:
        raise ConfigError(
            f"{_shown(key, str(path))} is in {package!r}, Ray's copy of the job's working directory: it has another "
            "path as soon as any file changes, and Ray removes it after the job, so that the results would be lost and "
            "nothing could be resumed.",
            "Give an absolute path on a disk that stays, or in an object store "
            "(s3://BUCKET/PREFIX) where that is possible.",
        )


def redact(text: str) -> str:
    """A text with the credentials of the URLs in it replaced by ``***``."""
    text = re.sub(r"(:/{1,3}|%3A//)(?:[^/?#\s]*:[^?#\s]*|[^/?#\s]*)@", r"\1***@", text, flags=re.IGNORECASE)
    return re.sub(
        r"([?&])([^=&\s]+)=([^&\s'\"]*)",
        lambda option: f"{option[1]}{option[2]}=***" if _SECRET_OPTION.search(option[2]) else option[0],
        text,
    )


def _shown(key: str, text: str) -> str:
    return f"{key} {_short(redact(text))!r}"


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]}...{text[-20:]}"


def _local_of(shown: str, text: str, separator: str, rest: str) -> str:
    """The path that a ``file:`` URL names."""
    if separator == ":///" and rest:
        return "/" + unquote(rest)
    if separator == "://" and rest.startswith("localhost/"):
        return unquote(rest.removeprefix("localhost"))
    raise ConfigError(f"{shown} is not file:///ABSOLUTE/PATH.", "Write the path itself.")


def _has_credentials(scheme: str, rest: str) -> bool:
    address, _, options = rest.partition("?")
    holder = address.partition("/")[0]
    user, at, host = holder.rpartition("@")
    if ":" in user or (":" in host and not host.rpartition(":")[2].isdigit()):
        return True
    if at and not (scheme in ("abfs", "abfss") or (scheme == "gs" and user == "anonymous")):
        return True
    names = [option.partition("=")[0] for option in options.split("&")]
    return "@" in unquote(options) or any(_SECRET_OPTION.search(unquote(name)) for name in names)


def _check_store(shown: str, scheme: str, text: str) -> str:
    address, mark, options = text.partition("?")
    parts = address.partition("://")[2].rstrip("/").split("/")
    host = parts[0].rpartition("@")[2]
    if not host:
        raise ConfigError(f"{shown} names no bucket.", f"Write {scheme}://BUCKET/PATH.")
    if ":" in host:
        raise ConfigError(
            f"{shown}: {host!r} is no bucket.",
            "The address of a store of your own goes into the environment, for s3:// as AWS_ENDPOINT_URL.",
        )
    if any(part in ("", ".", "..") for part in parts):
        raise ConfigError(f"{shown} has an empty part, `.` or `..`, which object stores do not have.", "Take it out.")
    if not re.fullmatch(rf"[A-Za-z0-9{re.escape(_URL_CHARACTERS)}]*", text):
        raise ConfigError(
            f"{shown} holds characters that a URL cannot.", f"Write {quote(text, safe=_URL_CHARACTERS)!r}."
        )
    if any(unicodedata.category(character) == "Cc" for character in unquote(text)):
        raise ConfigError(f"{shown} holds a control character, written with %.", "Rename what it names.")
    _check_lengths(shown, [unquote(part) for part in parts], unquote(address))
    return address.rstrip("/") + mark + options


def _check_local(shown: str, text: str) -> None:
    if text.startswith("~"):
        user, full = text[1:].partition("/")[0], os.path.expanduser(text)
        if full == text:
            reason = f"there is no user {user!r} on this machine" if user else "your home directory is not known"
            raise ConfigError(
                f"{shown}: {reason}.", "Write the path in full; for a file of that name, put ./ before it."
            )
        text = full
    _check_lengths(shown, text.split("/"), os.path.join(os.getcwd(), text))


def _check_lengths(shown: str, parts: list[str], whole: str) -> None:
    longest, length = max(len(part.encode()) for part in parts), len(whole.encode())
    if longest > MAX_NAME_BYTES:
        raise ConfigError(
            f"{shown} has a part of {longest:,} bytes; a name takes at most {MAX_NAME_BYTES}.", "Give a shorter path."
        )
    if length > MAX_PATH_BYTES:
        raise ConfigError(f"{shown} is {length:,} bytes long; a path takes at most {MAX_PATH_BYTES:,}.", "Shorten it.")
