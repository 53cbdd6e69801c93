"""One source, found and fingerprinted, ready to be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_lora.choices import DataSource
from dpo_lora.preferences.parts import Part
from dpo_lora.preferences.sources import files
from dpo_lora.preferences.sources.rows import Batch
from dpo_lora.resources import data_dir

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Source:
    part: Part
    paths: list[Path]
    digest: str  # of the bytes its rows come from
    commit: str | None = None  # hub only
    rows: datasets.Dataset | None = None  # hub only

    def batches(self) -> Iterator[Batch]:
        """Its rows; a fresh pass each time."""
        from dpo_lora.preferences.sources import hub  # imports datasets, which a wrong path need not wait for

        return files.read(self.paths) if self.rows is None else hub.read(self.part.path, self.rows)

    def facts(self) -> dict[str, Any]:
        """For the manifest: how another machine gets the same rows."""
        part = self.part
        return {
            "name": part.name,
            "source": part.source.value,
            "path": part.path,
            "files": [p.name for p in self.paths],
            "revision": part.revision,
            "commit": self.commit,
            "subset": part.subset,
            "split": part.split,
            "digest": self.digest,
        }


def require(part: Part) -> None:
    """Look whether a source on this disk is there; nothing is read.

    Raises:
        UserError: it is not, or it is no kind of file that pairs are read from.
    """
    if part.source is not DataSource.hub:
        files.locate(part.path, _folder(part), part.split)


def find(part: Part) -> Source:
    """The source that ``part`` names.

    Raises:
        UserError: it is not there, or cannot be had.
    """
    from dpo_lora.preferences.sources import hub

    if part.source is DataSource.hub:
        rows, commit = hub.fetch(part.path, part.subset, part.split, part.revision)
        paths = hub.files(rows)
        return Source(part, paths, files.digest(paths), commit, rows)
    paths = files.locate(part.path, _folder(part), part.split)
    return Source(part, paths, files.digest(paths))


def _folder(part: Part) -> Path:
    return data_dir() if part.source is DataSource.shipped else Path()
