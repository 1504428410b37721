"""A run's folder: what is in it, written and read atomically, with versions and checksums.

run.json             format, status, versions, what was trained on, cost
config.yaml          the resolved config, every default spelled out
encoder/             vocabularies and fitted transforms
layout.json          what the columns of encoded rows are
weights.safetensors  the best weights
optimiser.safetensors  only where training.keep_optimiser asks for it: the optimisers' state of those weights
calibrators.json     only where the config asks for them
history.jsonl        a line an evaluation or a roll-back
metrics.json         validation and test metrics of the best weights
reliability.json     the test rows' reliability curves
predictions.arrow    the test rows' labels and probabilities, for ``mldcn compare``
checkpoints/         the last few states of an unfinished run
manifest.json        checksums of all the above, written when the run is finished
report.html, tensorboard/, mlflow.txt   for people and trackers; no checksum vouches for them
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mldcn.errors import UserError
from mldcn.files import checksum, locked, sweep, sync_folder, write_text

FORMAT = 1
VERSIONED = "run.json"
MLFLOW_RUN = "mlflow.txt"
_UNVOUCHED = ("manifest.json", "report.html", "tensorboard", MLFLOW_RUN, "checkpoints")


class RunFolder:
    """One run's folder.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def encoder(self) -> Path:
        """The folder of vocabularies and transforms."""
        return self.path / "encoder"

    @property
    def weights(self) -> Path:
        """The best weights."""
        return self.path / "weights.safetensors"

    @property
    def predictions(self) -> Path:
        """Labels and probabilities of the test rows."""
        return self.path / "predictions.arrow"

    @property
    def history(self) -> Path:
        """A line an evaluation."""
        return self.path / "history.jsonl"

    @property
    def checkpoints(self) -> Path:
        """States of an unfinished run."""
        return self.path / "checkpoints"

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: str = "",
        notes: dict[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> RunFolder:
        """A new folder. A run that ended before its training began is replaced unasked.

        The folder appears with its config in it, so that it can be resumed however soon it is killed.

        Args:
            path: the folder.
            config: the resolved config as YAML.
            notes: more for ``run.json``.
            overwrite: replace a run that is there.

        Raises:
            UserError: something is there already, and ``overwrite`` is false or it is no run's folder; or another
                process writes it.
        """
        run = cls(path)
        with locked(run.path):
            run.check_room(overwrite=overwrite)
            old, new = run._replaced, run._begun
            for left in (old, new):
                shutil.rmtree(left, ignore_errors=True)
            new.mkdir(parents=True)
            write_text(cls(new).config, config)
            cls(new).write_info({"status": "new", **(notes or {})})
            if run.path.exists():
                run.path.rename(old)
            new.rename(run.path)
            sync_folder(run.path.parent)
            shutil.rmtree(old, ignore_errors=True)
        return run

    @property
    def _begun(self) -> Path:
        """Where a new run lies until it has its name."""
        return self.path.with_name(f".{self.path.name}.begun")

    @property
    def _replaced(self) -> Path:
        """Where a run that is replaced lies until it is removed."""
        return self.path.with_name(f".{self.path.name}.replaced")

    def check_room(self, *, overwrite: bool = False) -> None:
        """Refuses a folder in which no new run may begin.

        Raises:
            UserError: something is there already, and ``overwrite`` is false or it is no run's folder.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; name a folder with --out")
        if not any(self.path.iterdir()):
            return
        if not (self.path / VERSIONED).exists():
            raise UserError(
                f"{self.path}: is no run's folder, so it is not replaced; name another with --out"
            )
        if not overwrite and self.info().get("status") != "new":
            raise UserError(
                f"{self.path}: holds a run already; go on with --resume, replace it with --force, or name "
                "another folder with --out"
            )

    @classmethod
    def open(cls, path: str | Path, *, finished: bool = True) -> RunFolder:
        """An existing folder, checked.

        Raises:
            UserError: it is no run's folder, is of another version, unfinished or damaged.
        """
        run = cls(path)
        if not run.path.exists() and (run._begun / VERSIONED).exists():
            run._begun.rename(run.path)  # whoever replaced a run was killed between two renames
        info = run.info()
        if info.get("format") != FORMAT:
            raise UserError(
                f"{path}: a run of format {info.get('format')}; this version of mldcn reads format {FORMAT}. "
                "Train it again, or use the mldcn version named in its run.json"
            )
        if finished:
            if info.get("status") != "finished":
                raise UserError(f"{path}: the run is not finished; go on with 'mldcn fit --resume {path}'")
            run.verify()
        return run

    def info(self) -> dict[str, Any]:
        """What ``run.json`` says.

        Raises:
            UserError: this is no run's folder.
        """
        if not (self.path / VERSIONED).is_file():
            raise UserError(f"{self.path}: is no run's folder ({VERSIONED} is missing)")
        info = self.read_json(VERSIONED)
        if not isinstance(info, dict):
            raise UserError(f"{self.path / VERSIONED}: damaged, expected a mapping")
        return info

    def write_info(self, info: dict[str, Any]) -> None:
        """Writes ``run.json``."""
        write_text(self.path / VERSIONED, _json({"format": FORMAT, **info}))

    def read_json(self, name: str) -> Any:
        """A JSON file of the folder.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        except ValueError as error:
            raise UserError(f"{path}: damaged, not JSON ({error})") from None

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file of the folder atomically."""
        write_text(self.path / name, _json(value))

    def finish(self, notes: dict[str, Any] | None = None) -> None:
        """Marks the run finished: checksums written, checkpoints removed.

        Killed at any point, it leaves a run that can be resumed or one that is finished.

        Args:
            notes: more for ``run.json``.
        """
        sweep(self.path)
        info = {**self.info(), **(notes or {}), "status": "finished"}
        sums = {str(file.relative_to(self.path)): checksum(file) for file in self._files()}
        sums[VERSIONED] = f"{zlib.crc32(_json(info).encode()):08x}"
        self.write_json("manifest.json", {"format": FORMAT, "crc32": sums})
        self.write_info(info)
        for left in (self.checkpoints, self._begun, self._replaced):
            shutil.rmtree(left, ignore_errors=True)

    def verify(self) -> None:
        """Checks every file against the manifest.

        Raises:
            UserError: a file is missing or was changed.
        """
        manifest = self.read_json("manifest.json")
        sums = manifest.get("crc32") if isinstance(manifest, dict) else None
        if not isinstance(sums, dict) or VERSIONED not in sums:
            raise UserError(f"{self.path / 'manifest.json'}: damaged; train again or restore it")
        for name, expected in sums.items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"{file}: missing from the run; train it again or restore it")
            if checksum(file) != expected:
                raise UserError(
                    f"{file}: damaged (its checksum is not the manifest's); train again or restore it"
                )

    def _files(self) -> Iterator[Path]:
        """The files that the manifest vouches for: all but pages and logs made for people."""
        for file in sorted(self.path.rglob("*")):
            relative = file.relative_to(self.path)
            if file.is_file() and relative.parts[0] not in _UNVOUCHED:
                yield file


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
