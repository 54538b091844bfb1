"""Reads the header of a GGUF file: metadata and tensor table, never a weight.

The file may be truncated, hostile or of a kind that does not exist yet; the engine trusts it more than it should. So
every count, length and offset is checked against a limit and against the size of the file before it is used, big
arrays are stepped over, and whatever is wrong comes out as one refusal that names the file, the place and what to do.
"""

import os
import stat
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from msgspec import Struct

from sollol.errors import Reason, refuse
from sollol.gguf_source import LONGEST_STRING, Source
from sollol.gguf_tables import FILE_TYPE_GUESSED, FILE_TYPES, TENSOR_TYPES
from sollol.names import quoted

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Larger than anything in use (262 144 tokens, 514 906 merges, some 2 000 tensors), small enough to read in a second.
MOST_ENTRIES = 65_536  # metadata entries, and tensors
MOST_STRINGS = 4_194_304  # in all arrays together
LONGEST_ARRAY = 1 << 28
LONGEST_KEY = 4_096
LONGEST_KEPT_STRING = 65_536
LONGEST_KEPT_ARRAY = 1_024  # the engine allows 512 layers, and it is the per-layer arrays that are needed
MOST_KEPT_BYTES = 16 * 1024**2
LONGEST_TENSOR_NAME = 63
MOST_DIMENSIONS = 4
LARGEST_TENSOR = (1 << 63) - 1
DEFAULT_ALIGNMENT = 32
LARGEST_ALIGNMENT = 1 << 20

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, str] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


class Skipped(Struct, frozen=True):
    """Stands for a metadata value that was not kept: an array of `length` elements, or a string of `length` bytes."""

    length: int


Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | tuple[Scalar, ...] | Skipped


class TensorInfo(Struct, frozen=True):
    """`dims` innermost first; `offset` from the start of the file; `type` is a key of `TENSOR_TYPES`."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int
    size_bytes: int


class Header(Struct, frozen=True, kw_only=True):
    """One file's header. `name` is the file's, for messages; the tensors' data begins at `header_bytes`."""

    name: str
    version: int
    metadata: dict[str, Value]
    tensors: tuple[TensorInfo, ...]
    header_bytes: int
    file_size: int


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises:
        SollolError: MODEL_CORRUPT, or MODEL_UNSUPPORTED for a version or tensor type that is legal but unknown here.
    """
    try:
        # Non-blocking: opening a named pipe then returns, and the next check refuses it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise refuse(Reason.MODEL_CORRUPT, f"{quoted(path.name)} is not a regular file; remove it")
            return _HeaderReader(Source(file, path.name, status.st_size), path.name).header()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or str(error)
        raise refuse(
            Reason.MODEL_CORRUPT,
            f"{quoted(path.name)} cannot be read: {why}; check that it exists and may be read",
            retryable=isinstance(error, OSError),  # the file may be well
        ) from error


def has_chat_template(header: Header) -> bool:
    return "tokenizer.chat_template" in header.metadata


def quantization_of(headers: Sequence[Header]) -> str:
    """`Q4_K_M` and the like: what the file says, else the type of most of its bytes."""
    file_type = headers[0].metadata.get("general.file_type")
    if isinstance(file_type, int) and (name := FILE_TYPES.get(file_type & ~FILE_TYPE_GUESSED)):
        return name
    sizes: Counter[int] = Counter()
    for header in headers:
        for tensor in header.tensors:
            sizes[tensor.type] += tensor.size_bytes
    return TENSOR_TYPES[sizes.most_common(1)[0][0]][0] if sizes else ""


class _HeaderReader:
    """Reads one header from its beginning to its end."""

    def __init__(self, source: Source, name: str) -> None:
        self._source = source
        self._name = name
        self._kept_bytes = 0
        self._strings = 0

    def header(self) -> Header:
        source = self._source
        version = self._version()
        tensor_count = self._count("tensors")
        metadata: dict[str, Value] = {}
        for _ in range(self._count("metadata entries")):
            key = source.text(source.string_length(LONGEST_KEY, "a metadata key"))
            if not key or key in metadata or not self._keeps(len(key)):
                raise source.corrupt(f"metadata key {quoted(key)} is empty, there twice or one too many")
            metadata[key] = self._value(key)
        alignment = self._alignment(metadata)
        unplaced = self._tensor_table(tensor_count)
        start = _aligned(source.offset, alignment) if unplaced else source.offset
        return Header(
            name=self._name,
            version=version,
            metadata=metadata,
            tensors=self._placed(unplaced, start, alignment),
            header_bytes=start,
            file_size=source.size,
        )

    def _version(self) -> int:
        source = self._source
        magic = source.take(min(4, source.size))
        if magic != MAGIC:
            raise source.corrupt(f"it begins with {magic!a} and not with {MAGIC!a}, so it is no GGUF file")
        version = source.number("<I")
        if version and not version & 0xFFFF:
            raise source.unsupported("its numbers are big-endian; convert it with gguf_convert_endian.py")
        if version == 0:
            raise source.corrupt("its version is 0")
        if version not in VERSIONS:
            raise source.unsupported(f"GGUF version {version} is unknown here; get the model in version 3")
        return version

    def _count(self, what: str) -> int:
        count = self._source.number("<Q")
        if count > MOST_ENTRIES:
            raise self._source.corrupt(f"it claims {count} {what}, more than {MOST_ENTRIES}")
        return count

    def _keeps(self, length: int) -> bool:
        """Whether `length` more bytes may be kept in memory."""
        self._kept_bytes += length
        return self._kept_bytes <= MOST_KEPT_BYTES

    def _value(self, key: str) -> Value:
        source = self._source
        kind = source.number("<I")
        if kind == _ARRAY:
            return self._array(key)
        if kind != _STRING:
            return self._scalars(kind, 1, key)[0]
        length = source.string_length(LONGEST_STRING, f"metadata {quoted(key)}")
        if length <= LONGEST_KEPT_STRING and self._keeps(length):
            return source.text(length)
        source.skip(length)
        return Skipped(length)

    def _array(self, key: str) -> Value:
        source = self._source
        kind = source.number("<I")
        count = source.number("<Q")
        if kind == _ARRAY:
            raise source.unsupported(f"metadata {quoted(key)} is an array of arrays, which the engine refuses")
        if count > LONGEST_ARRAY:
            raise source.corrupt(f"the array {quoted(key)} claims {count} elements, more than {LONGEST_ARRAY}")
        if kind == _STRING:
            self._strings += count
            if self._strings > MOST_STRINGS:
                raise source.corrupt(f"with the array {quoted(key)} it claims more than {MOST_STRINGS} strings")
            source.skip_strings(count, f"the array {quoted(key)}")
            return Skipped(count)
        size = struct.calcsize(self._form(kind, key)) * count
        if count <= LONGEST_KEPT_ARRAY and self._keeps(size):
            return self._scalars(kind, count, key)
        source.skip(size)
        return Skipped(count)

    def _scalars(self, kind: int, count: int, key: str) -> tuple[Scalar, ...]:
        form = self._form(kind, key)
        return tuple(value for (value,) in struct.iter_unpack(form, self._source.take(count * struct.calcsize(form))))

    def _form(self, kind: int, key: str) -> str:
        if kind not in _SCALARS:
            raise self._source.corrupt(f"metadata {quoted(key)} has the unknown type {kind}")
        return _SCALARS[kind]

    def _alignment(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
            raise self._source.corrupt(f"its alignment {quoted(str(alignment))} is no power of 2")
        return alignment

    def _tensor_table(self, count: int) -> list[TensorInfo]:
        """The table's entries, their offsets still relative to where the data begins."""
        table: dict[str, TensorInfo] = {}
        for _ in range(count):
            tensor = self._tensor()
            if tensor.name in table:
                raise self._source.corrupt(f"tensor {quoted(tensor.name)} is there twice")
            table[tensor.name] = tensor
        return list(table.values())

    def _tensor(self) -> TensorInfo:
        source = self._source
        name = source.text(source.string_length(LONGEST_TENSOR_NAME, "a tensor's name"))
        dimensions = source.number("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise source.corrupt(f"tensor {quoted(name)} claims {dimensions} dimensions, must be 1 to 4")
        dims = struct.unpack(f"<{dimensions}Q", source.take(8 * dimensions))
        kind = source.number("<I")
        size = self._size(name, dims, kind)
        return TensorInfo(name, dims, kind, source.number("<Q"), size)

    def _size(self, name: str, dims: tuple[int, ...], kind: int) -> int:
        if kind not in TENSOR_TYPES:
            raise self._source.unsupported(
                f"tensor {quoted(name)} has the type {kind}, unknown here; get the model in another quantization"
            )
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        elements = 1
        for dim in dims:
            elements *= dim
        if not 0 < elements <= LARGEST_TENSOR or dims[0] % block:
            raise self._source.corrupt(f"tensor {quoted(name)} of type {type_name} has the impossible shape {dims}")
        return elements // block * block_bytes

    def _placed(self, tensors: list[TensorInfo], start: int, alignment: int) -> tuple[TensorInfo, ...]:
        """Offsets from the start of the file. The engine wants the data gapless and in the table's order."""
        placed, end = [], start
        for tensor in tensors:
            if tensor.offset != end - start:
                raise self._source.corrupt(
                    f"the data of tensor {quoted(tensor.name)} begins at {tensor.offset} and not at {end - start}"
                )
            if end + tensor.size_bytes > self._source.size:
                raise self._source.corrupt(
                    f"the data of tensor {quoted(tensor.name)} ends at byte {end + tensor.size_bytes}, "
                    f"but the file has only {self._source.size}: it is incomplete"
                )
            placed.append(TensorInfo(tensor.name, tensor.dims, tensor.type, end, tensor.size_bytes))
            end = _aligned(end + tensor.size_bytes, alignment)
        return tuple(placed)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
