"""Models in an Ollama store: manifests name them, blobs hold them. Only ever read."""

import re
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.names import quoted

from agent.model_files import FoundModel, link_problem, model_name, real_path
from agent.told_once import warn_once

MODEL_LAYER = "application/vnd.ollama.image.model"
ADAPTER_LAYER = "application/vnd.ollama.image.adapter"
LARGEST_MANIFEST = 1024**2
MOST_MANIFESTS = 10_000
DEFAULT_HOST, DEFAULT_NAMESPACE, DEFAULT_TAG = "registry.ollama.ai", "library", "latest"
# Ollama's grammar of a name's parts, and of a digest, which becomes a file name here.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}\Z", re.ASCII)
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})\Z", re.ASCII)

log = structlog.get_logger(__name__)


class _Layer(Struct, rename={"media_type": "mediaType"}):
    media_type: str
    digest: str


class _Manifest(Struct):
    layers: tuple[_Layer, ...] | None = ()


def find_in_ollama(store: Path) -> Iterator[FoundModel]:
    """Every model of the store, in the order of their names, `llama3.1:70b`; `:latest` answers to the bare name too.

    Models without a GGUF of their own (cloud models) are left out.
    """
    for path in _manifests(store / "manifests"):
        names = _names(path)
        try:
            blob = _model_blob(path, store / "blobs")
        except SollolError as error:
            yield FoundModel(parts=(path,), names=names, source="ollama", problem=error.refusal)
            continue
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            yield FoundModel(parts=(path,), names=names, source="ollama", problem=_problem(names[0], error))
            continue
        if blob is not None:
            problem = link_problem((blob,), (real_path(store / "blobs"),))
            yield FoundModel(parts=(blob,), names=names, source="ollama", problem=problem)


def _problem(name: str, error: Exception) -> Refusal:
    why = getattr(error, "strerror", None) or str(error)
    message = f"Ollama's manifest of {name} cannot be used: {why}; pull the model again"
    return Refusal(reason=Reason.MODEL_CORRUPT, message=message)


def _manifests(manifests: Path) -> list[Path]:
    """Paths of the form host/namespace/model/tag that follow Ollama's grammar."""
    found: list[Path] = []
    for path in manifests.glob("*/*/*/*"):
        if not _is_manifest(path):
            continue
        if len(found) == MOST_MANIFESTS:
            warn_once("ollama_models_left_out", manifests, f"only {MOST_MANIFESTS} manifests are read")
            break
        found.append(path)
    return sorted(found)


def _is_manifest(path: Path) -> bool:
    try:
        return all(_PART.match(part) for part in path.parts[-4:]) and stat.S_ISREG(path.lstat().st_mode)
    except OSError as error:  # gone since it was listed, or not ours to look at
        log.debug("ollama_manifest_unreadable", path=str(path), error=error.strerror)
        return False


def _names(manifest: Path) -> tuple[str, ...]:
    host, namespace, model, tag = manifest.parts[-4:]
    if host != DEFAULT_HOST:
        prefix = f"{host}/{namespace}/"
    elif namespace != DEFAULT_NAMESPACE:
        prefix = f"{namespace}/"
    else:
        prefix = ""
    names = [f"{prefix}{model}:{tag}", *([f"{prefix}{model}"] if tag == DEFAULT_TAG else [])]
    return tuple(model_name(name) for name in names)


def _model_blob(manifest: Path, blobs: Path) -> Path | None:
    with manifest.open("rb") as file:
        raw = file.read(LARGEST_MANIFEST + 1)
    if len(raw) > LARGEST_MANIFEST:
        raise ValueError(f"it has more than {LARGEST_MANIFEST} bytes")
    layers = msgspec.json.decode(raw, type=_Manifest).layers or ()
    models = [layer for layer in layers if layer.media_type == MODEL_LAYER]
    if any(layer.media_type == ADAPTER_LAYER for layer in layers):
        raise refuse(
            Reason.MODEL_UNSUPPORTED,
            f"Ollama's {_names(manifest)[0]} is a model with a LoRA adapter, which is not applied here; "
            "merge the adapter into a GGUF",
        )
    if not models:
        return None
    digest = _DIGEST.match(models[0].digest)
    if digest is None:
        raise ValueError(f"the digest {quoted(models[0].digest)} is none")
    return blobs / f"sha256-{digest[1].lower()}"
