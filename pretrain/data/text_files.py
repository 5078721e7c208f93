"""Plain text files as documents: blank lines part one document from the next."""

from __future__ import annotations

import bisect
import codecs
import mmap
import re
from array import array
from pathlib import Path

from pretrain.data.sources import Source, parse_split, resolve_files

SUFFIXES = (".txt",)
SEPARATOR = re.compile(rb"(?:\A|\n)(?:[ \t\r]*\n)+")
"""One blank line or more; at the head of a file even the first line may be blank."""
CHECKED_BYTES = 1 << 20


class TextDocuments:
    """Files of UTF-8 text. A document is a run of lines with no blank line among them; none spans two files.

    So a play gives its speeches, and prose its paragraphs; text that should stay whole across blank lines belongs into
    a JSON Lines file (kind hf). White space at a document's end is left out. The files have one split, `train`, which
    may be sliced: `train[:90%]`. Files are mapped into memory, and only offsets are held, 16 bytes a document.
    """

    def __init__(self, source: Source) -> None:
        """Maps the files and finds the documents.

        Raises:
            ValueError: no file is there, a file is not UTF-8, or the split is not `train`.
        """
        self._maps: list[mmap.mmap] = []
        self._first_of_file: list[int] = []
        self._starts, self._stops = array("q"), array("q")
        for path in resolve_files(source, SUFFIXES):
            if path.stat().st_size:
                self._add_file(source, path)
        if self._starts:
            _, self._chosen = parse_split(source, {"train": len(self._starts)})
        else:
            self._chosen = range(0)

    def _add_file(self, source: Source, path: Path) -> None:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _require_utf8(source, path, mapped)
        self._maps.append(mapped)
        self._first_of_file.append(len(self._starts))
        start = 0
        for separator in SEPARATOR.finditer(mapped):
            self._add_document(mapped, start, separator.start())
            start = separator.end()
        self._add_document(mapped, start, len(mapped))

    def _add_document(self, mapped: mmap.mmap, start: int, stop: int) -> None:
        while stop > start and mapped[stop - 1] in b" \t\r\n":
            stop -= 1
        if stop > start:
            self._starts.append(start)
            self._stops.append(stop)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int, /) -> str:
        number = self._chosen[index]
        mapped = self._maps[bisect.bisect_right(self._first_of_file, number) - 1]
        return mapped[self._starts[number] : self._stops[number]].decode("utf-8")


def _require_utf8(source: Source, path: Path, mapped: mmap.mmap) -> None:
    """Decodes the whole file once, so that a bad byte ends the run at its start and not in its middle."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(mapped), CHECKED_BYTES):
        held = len(decoder.getstate()[0])
        chunk = mapped[start : start + CHECKED_BYTES]
        try:
            decoder.decode(chunk, final=start + len(chunk) == len(mapped))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{source.path_key}={source.path!r}: {path} is not UTF-8 at byte {start - held + error.start}; "
                "convert the file to UTF-8"
            ) from error
