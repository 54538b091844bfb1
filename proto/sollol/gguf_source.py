"""The bytes of one GGUF header, read forwards in chunks: no step leaves the file or a limit."""

import struct
from typing import BinaryIO

from sollol.errors import Reason, SollolError, refuse
from sollol.names import quoted

LARGEST_HEADER = 256 * 1024**2
LONGEST_STRING = 16 * 1024**2
_CHUNK = 256 * 1024
_U64 = struct.Struct("<Q")


class Source:
    """Memory stays near one chunk, whatever the file claims."""

    def __init__(self, file: BinaryIO, name: str, size: int) -> None:
        self.size = size
        self._file = file
        self._name = name
        self._chunk = b""
        self._chunk_offset = 0
        self._at = 0  # in the chunk

    @property
    def offset(self) -> int:
        return self._chunk_offset + self._at

    def corrupt(self, what: str) -> SollolError:
        return refuse(
            Reason.MODEL_CORRUPT,
            f"{quoted(self._name)} is damaged at byte {self.offset}: {what}; download or copy it again",
            numbers={"offset": self.offset, "file_size_bytes": self.size},
        )

    def unsupported(self, what: str) -> SollolError:
        return refuse(
            Reason.MODEL_UNSUPPORTED,
            f"{quoted(self._name)} at byte {self.offset}: {what}",
            numbers={"offset": self.offset, "file_size_bytes": self.size},
        )

    def take(self, length: int) -> bytes:
        self._check(length)
        while len(self._chunk) - self._at < length:
            self._refill()
        taken = self._chunk[self._at : self._at + length]
        self._at += length
        return taken

    def skip(self, length: int) -> None:
        self._check(length)
        if self._at + length <= len(self._chunk):
            self._at += length
        else:
            self._chunk_offset, self._chunk, self._at = self.offset + length, b"", 0

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def string_length(self, longest: int, what: str) -> int:
        length = self.number("<Q")
        if length > longest:
            raise self.corrupt(f"{what} claims {length} bytes, more than {longest}")
        return length

    def text(self, length: int) -> str:
        return self.take(length).decode(errors="backslashreplace")

    def skip_strings(self, count: int, what: str) -> None:
        for _ in range(count):  # once per token and merge of a vocabulary: no calls while inside the chunk
            if len(self._chunk) - self._at >= 8:
                length = _U64.unpack_from(self._chunk, self._at)[0]
                self._at += 8
            else:
                length = self.number("<Q")
            if self._at + length <= len(self._chunk):
                self._at += length
            elif length > LONGEST_STRING:
                raise self.corrupt(f"a string in {what} claims {length} bytes, more than {LONGEST_STRING}")
            else:
                self.skip(length)

    def _check(self, length: int) -> None:
        if length > self.size - self.offset:
            raise self.corrupt(f"the file ends after {self.size} bytes, in the middle of its header")
        if self.offset + length > LARGEST_HEADER:
            raise self.corrupt(f"the header is longer than {LARGEST_HEADER} bytes")

    def _refill(self) -> None:
        """Drop what was walked over and read on, at least one byte."""
        rest = self._chunk[self._at :]
        self._chunk_offset, self._at = self.offset, 0
        self._file.seek(self._chunk_offset + len(rest))
        more = self._file.read(_CHUNK)
        if not more:
            raise self.corrupt("it became shorter while it was read")
        self._chunk = rest + more
