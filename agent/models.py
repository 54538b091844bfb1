"""The models on this node: what is in the operator's directories, by name."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace
from sollol.errors import Reason, Refusal, Retry, SollolError, refuse
from sollol.gguf import Header, has_chat_template, quantization_of
from sollol.gguf_split import read_model
from sollol.names import closest, quoted
from sollol.report import Model
from sollol.shape import is_addition, shape_of

from agent.huggingface_cache import find_in_huggingface
from agent.model_files import FoundModel, find_in_directory, real_path
from agent.ollama_store import find_in_ollama
from agent.told_once import warn_once

MOST_MODELS = 10_000
SYSTEM_OLLAMA_DIR = Path("/usr/share/ollama/.ollama/models")
_CHUNK = 1024**2


class ModelRoots(Struct, frozen=True):
    """Where models are looked for. Relative order decides who gets a name that two files want."""

    directories: tuple[Path, ...] = ()
    ollama: Path | None = None
    huggingface: Path | None = None


# Path, size, times of modification and of the inode's change for every part: while they stay, no header is read again.
_Version = tuple[tuple[str, int, int, int], ...]


class _Listing(Struct, frozen=True):
    """The outcome of one scan. Replaced as a whole, so that readers in another thread see one or the other."""

    models: tuple[Model, ...] = ()
    by_name: dict[str, Model] = {}
    paths: dict[str, Path] = {}


class Inventory:
    """Names lead to files only through the last scan: text from a request never becomes a path."""

    def __init__(self, roots: ModelRoots) -> None:
        self._roots = roots
        self._listing = _Listing()
        self._known: dict[_Version, Model | None] = {}

    def look_in(self, roots: ModelRoots) -> None:
        """From the next scan on."""
        self._roots = roots

    def scan(self) -> tuple[Model, ...]:
        """Look through all roots again. Blocks on the disk: run it in a thread, one at a time.

        A file that cannot be used becomes a model with a `problem`, and hides no other.
        """
        known: dict[_Version, Model | None] = {}
        taken: dict[str, int] = {}  # name or alias to index in `listed`
        listed: list[tuple[Model, Path]] = []
        by_file: dict[Path, int] = {}
        for found in self._found():
            file = real_path(found.parts[0])
            if file in by_file:  # another name for the same bytes, as Ollama's tags often are
                _add_aliases(listed, taken, by_file[file], found)
                continue
            model = self._described(found, known)
            if model is None:
                continue
            by_file[file] = len(listed)
            names = _free_names(found, taken)
            taken.update(dict.fromkeys(names, len(listed)))
            listed.append((replace(model, name=names[0], aliases=names[1:]), found.parts[0]))
        self._known = known
        self._listing = _Listing(
            models=tuple(model for model, _ in listed),
            by_name={name: listed[index][0] for name, index in taken.items()},
            paths={model.name: path for model, path in listed},
        )
        return self._listing.models

    def model(self, name: str) -> Model:
        """The usable model with this name or alias.

        Raises:
            SollolError: MODEL_NOT_FOUND naming the closest names, or what is wrong with the file.
        """
        listing = self._listing
        model = listing.by_name.get(name)
        if model is None:
            near = closest(name, listing.by_name)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {len(listing.models)} others"
            raise refuse(Reason.MODEL_NOT_FOUND, f"this node has no model named {quoted(name)}; {hint}")
        if model.problem is not None:
            raise SollolError(model.problem)
        return model

    def path_of(self, name: str) -> Path:
        """The file to give the engine, the first part of a split model.

        Raises:
            SollolError: as `model`.
        """
        return self._listing.paths[self.model(name).name]

    def _found(self) -> Iterator[FoundModel]:
        allowed = [real_path(root) for root in self._roots.directories]
        for count, found in enumerate(self._found_in_all(allowed)):
            if count == MOST_MODELS:
                warn_once(
                    "models_left_out", found.parts[0], f"only {MOST_MODELS} models are listed, not those from here on"
                )
                return
            yield found

    def _found_in_all(self, allowed: Sequence[Path]) -> Iterator[FoundModel]:
        for directory in self._roots.directories:
            yield from find_in_directory(directory, allowed)
        if self._roots.ollama is not None:
            yield from find_in_ollama(self._roots.ollama)
        if self._roots.huggingface is not None:
            yield from find_in_huggingface(self._roots.huggingface)

    def _described(self, found: FoundModel, known: dict[_Version, Model | None]) -> Model | None:
        """The model without its names; None for a file that is an addition to another model."""
        if found.problem is not None:
            return _broken(found, (), found.problem)
        version = _version(found.parts)
        if version in self._known:
            model = self._known[version]
        else:
            model = _read(found, version)
            if model is not None and model.problem is not None and model.problem.retry is Retry.RETRYABLE:
                return model  # the disk's fault, or the permissions': the file need not change for it to be well
        known[version] = model
        return model


def _version(parts: Sequence[Path]) -> _Version:
    seen = []
    for path in parts:
        try:
            status = path.stat()
        except OSError:  # missing or not allowed: reading it will say so
            seen.append((str(path), -1, -1, -1))
        else:
            seen.append((str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(seen)


def _read(found: FoundModel, version: _Version) -> Model | None:
    try:
        headers = read_model(found.parts)
        if is_addition(headers[0]):
            return None
        return Model(
            name="",
            size_bytes=sum(header.file_size for header in headers),
            identity=_identity(version, found.parts, headers),
            source=found.source,
            quantization=quantization_of(headers),
            shape=shape_of(headers),
            has_chat_template=has_chat_template(headers[0]),
        )
    except SollolError as error:
        return _broken(found, version, error.refusal)
    except OSError as error:  # unreadable between header and hash
        message = f"{quoted(found.parts[0].name)}: {error.strerror}"
        return _broken(found, version, refuse(Reason.MODEL_CORRUPT, message, retryable=True).refusal)


def _broken(found: FoundModel, version: _Version, problem: Refusal) -> Model:
    size = sum(max(0, size) for _, size, _, _ in version)
    return Model(name="", size_bytes=size, identity=_identity(version, (), ()), source=found.source, problem=problem)


def _identity(version: _Version, parts: Sequence[Path], headers: Sequence[Header]) -> str:
    """Changes when a file changes: sizes, modification times and headers, hashed. The same for a copied tree."""
    digest = hashlib.blake2b(repr([(size, mtime) for _, size, mtime, _ in version]).encode(), digest_size=16)
    for path, header in zip(parts, headers, strict=True):
        left = header.header_bytes
        with path.open("rb") as file:
            while left and (chunk := file.read(min(_CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def _free_names(found: FoundModel, taken: Mapping[str, int]) -> tuple[str, ...]:
    """The names that are still free; when none is, a longer one, in the end a numbered one."""
    names = tuple(name for name in dict.fromkeys(found.names) if name not in taken)
    if names:
        return names
    longer = [name for name in found.fallback_names if name not in taken]
    numbered = (f"{found.names[0]}@{number}" for number in range(2, MOST_MODELS + 2))
    return (longer[0] if longer else next(name for name in numbered if name not in taken),)


def _add_aliases(listed: list[tuple[Model, Path]], taken: dict[str, int], index: int, found: FoundModel) -> None:
    new = tuple(name for name in found.names if name not in taken)
    taken.update(dict.fromkeys(new, index))
    model, path = listed[index]
    listed[index] = (replace(model, aliases=model.aliases + new), path)


def model_roots(
    directories: tuple[Path, ...], *, ollama: str, huggingface: str, environ: Mapping[str, str]
) -> ModelRoots:
    """`ollama`, `huggingface`: a directory, "auto" for where these programs keep their models, empty for none."""

    def place(setting: str, default: Path | None) -> Path | None:
        if setting == "auto":
            return default
        return Path(setting).expanduser() if setting else None

    return ModelRoots(
        directories=directories,
        ollama=place(ollama, default_ollama_dir(environ)),
        huggingface=place(huggingface, default_huggingface_dir(environ)),
    )


def default_ollama_dir(environ: Mapping[str, str]) -> Path | None:
    """`$OLLAMA_MODELS`, else the system service's store, else the user's; None when there is none."""
    if given := environ.get("OLLAMA_MODELS"):
        return Path(given).expanduser()
    candidates = (SYSTEM_OLLAMA_DIR, _home(environ) / ".ollama" / "models")
    return next((path for path in candidates if os.access(path / "manifests", os.R_OK | os.X_OK)), None)


def default_huggingface_dir(environ: Mapping[str, str]) -> Path | None:
    """`$HF_HUB_CACHE`, else `hub` in `$HF_HOME`, else in the user's cache; None when there is none."""
    if given := environ.get("HF_HUB_CACHE"):
        return Path(given).expanduser()
    if home := environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = Path(environ.get("XDG_CACHE_HOME") or _home(environ) / ".cache") / "huggingface" / "hub"
    return cache if os.access(cache, os.R_OK | os.X_OK) else None


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if environ.get("HOME") else Path.home()
