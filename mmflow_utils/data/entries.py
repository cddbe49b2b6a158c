"""A large JSON object, read one entry at a time: GQA's question files have 100 MB and more.

The standard library's decoder reads the entries, so that they are what `read_json` would give. (ijson, made
for this, turns half a character into a question mark, and takes minutes over an entry of deep nesting.)
"""

import codecs
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from mmflow_utils.data.fields import json_errors, read_json

__all__ = ["read_entries"]

CHUNK = 2**20  # bytes read at a time
LONGEST = 2**24  # characters of one entry; GQA's have some thousands
NO_BAR_BELOW = 2**25  # bytes; a smaller file is read within a second

_DECODE = json.JSONDecoder().raw_decode
_NUMBER = "0123456789.eE+-"
_SPACE = re.compile(r"[ \t\n\r]*")


def read_entries(path: Path | str, what: str, *, progress: bool = True) -> Iterator[tuple[str, Any]]:
    """Read a JSON object entry by entry, so that memory doesn't grow with the file.

    Args:
        path: The file.
        what: Names it in errors and in the bar, as in "GQA question file".
        progress: Show a bar of bytes for a file of 32 MB or more.

    Yields:
        Key and value, in the file's order. A key that stands twice comes twice.

    Raises:
        ValueError: A file that is missing, cut short (names entry and byte), or no object with entries.
    """
    key = None
    with json_errors(path, what), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        quiet = not progress or size < NO_BAR_BELOW
        with tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=quiet) as bar:
            text = _Text(file, bar)
            is_object = text.next_mark() == "{"
            for key, value in text.entries() if is_object else ():
                yield key, value
    if key is None:
        kind = "nothing in it" if is_object else f"a {type(read_json(path, what)).__name__}"
        raise ValueError(f"{path} has {kind} at the top: expected a {what}, entries keyed by id")


class _Text:
    """The stretch of a file that is being read."""

    def __init__(self, file: BinaryIO, bar: tqdm):
        self.file, self.bar = file, bar
        self.decode = codecs.getincrementaldecoder("utf-8-sig")("surrogatepass").decode
        self.text, self.at = "", 0

    def read_on(self) -> bool:
        """Let go what is done and read a chunk more; False at the end of the file."""
        chunk = self.file.read(CHUNK)
        self.bar.update(len(chunk))
        if more := self.decode(chunk, not chunk):
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(chunk)

    def next_mark(self) -> str:
        """Give the next character that is no white space, without going past it; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.read_on():
                return self.text[self.at : self.at + 1]

    def skip(self, mark: str) -> None:
        """Go past a mark that must stand here."""
        if self.next_mark() != mark:
            raise json.JSONDecodeError(f"Expecting {mark!r}", self.text, self.at)
        self.at += 1

    def value(self) -> Any:
        """Read a value whole."""
        self.next_mark()
        while True:
            wrong = None
            try:
                value, end = _DECODE(self.text, self.at)
                whole = self.text[end : end + 1] not in _NUMBER  # a number may go on in the next chunk
            except json.JSONDecodeError as error:  # wrong, or not all there yet
                wrong, whole = error, False
            if whole or len(self.text) - self.at > LONGEST or not self.read_on():
                break
        if wrong:
            raise wrong
        self.at = end
        return value

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Read the entries of the object that begins here, to the end of the file."""
        n, key = 0, None
        try:
            self.skip("{")
            while self.next_mark() != "}":
                if n:
                    self.skip(",")
                if self.next_mark() != '"':
                    raise json.JSONDecodeError("Expecting a key in double quotes", self.text, self.at)
                key = self.value()
                self.skip(":")
                yield key, self.value()
                n += 1
            self.skip("}")
            if self.next_mark():
                raise json.JSONDecodeError("Extra data", self.text, self.at)
        except json.JSONDecodeError as error:
            rest = error.doc[error.pos :].encode("utf-8", "surrogatepass")
            raise ValueError(self._place(error.msg, len(rest), n, key)) from None
        except UnicodeDecodeError as error:
            raise ValueError(self._place(error.reason, len(error.object) - error.start, n, key)) from None

    def _place(self, message: str, n_bytes_left: int, n_entries: int, key: str | None) -> str:
        byte = self.file.tell() - n_bytes_left
        return f"{message} at byte {byte:,}, in entry {n_entries + 1}, last key {key!r}"
