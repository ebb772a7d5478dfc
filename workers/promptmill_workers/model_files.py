"""The files of a model: which model they are, told by a fingerprint, and whether they are still what was loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

#: Bytes at each end of a file that go into its fingerprint: hashing all of a large model would take minutes.
FINGERPRINT_BYTES = 1024 * 1024

#: Pieces between its ends that go into it too, evenly spread: another training of a model changes all of its tensors.
PIECES, PIECE_BYTES = 512, 16 * 1024

#: What of a folder is an MLX model. Anything else of a repository is not fetched, and changes no answer.
MLX_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")


@dataclass(frozen=True, slots=True)
class FileState:
    """A file as it lies on the disk now. Writing to it, or putting another in its place, changes one of these."""

    path: str
    inode: int
    size: int
    modified_ns: int


def states_of(path: Path) -> tuple[FileState, ...]:
    """The state of each of the model's files, by name; none where there is no model any more."""
    try:
        return tuple(_state(each) for each in _files(path))
    except OSError:
        return ()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(each for each in path.iterdir() if each.is_file() and any(fnmatch(each.name, p) for p in MLX_FILES))


def _state(path: Path) -> FileState:
    found = path.stat()
    return FileState(str(path), found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=64)
def fingerprint_of(files: tuple[FileState, ...]) -> str:
    """SHA-256 over the files' names and sizes, the first and last MiB of each, and pieces between. Raises OSError."""
    digest = hashlib.sha256()
    for each in files:
        digest.update(f"{Path(each.path).name}:{each.size}\n".encode())
        with open(each.path, "rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            between = each.size - 2 * FINGERPRINT_BYTES
            for piece in range(PIECES if between > 0 else 0):
                file.seek(FINGERPRINT_BYTES + between * piece // PIECES)
                digest.update(file.read(PIECE_BYTES))
            file.seek(max(0, each.size - FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class LoadedFiles:
    """What a host has loaded: from where, in which state the files were then, and which model they are."""

    path: str
    states: tuple[FileState, ...]
    fingerprint: str

    @property
    def are_current(self) -> bool:
        """Whether a load would find the same files again."""
        return states_of(Path(self.path)) == self.states

    @property
    def are_overwritten(self) -> bool:
        """Whether one of the files was written to. An engine maps its file: it computes with what is written there.

        A file that was put in the place of a loaded one is another file: the engine keeps the one it has.
        """
        now = {(each.path, each.inode): each for each in states_of(Path(self.path))}
        return any(now.get((each.path, each.inode), each) != each for each in self.states)
