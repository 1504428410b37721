"""Damages copies of everything that mldcn writes or reads, and lets the command that would read it read it.

Each copy has one file damaged: a bit or a byte changed, a run of bytes overwritten, the file cut or lengthened,
a page zeroed, a value in JSON replaced by a strange one. What must come of it: an error that names the file, the
same result as from the undamaged file, or a result made anew that is the same. Never another exception, the
death of the process, a hang or another result. Raw text has no checksum, nor have zstd's frames unless they were
asked for, so that a log that says something else is only required to be read or refused.

    python endurance/corrupt.py                                  # 1,000 copies of every artefact
    python endurance/corrupt.py --only run/weights.safetensors --first 17 --copies 1    # one of them again
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import multiprocessing
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    command_environment,
    digest_bytes,
    digest_encoded,
    digest_files,
    digest_results,
    digest_study,
    markdown,
    mldcn_command,
    write_small_log,
    write_small_study,
)

PAGE = 512
HANG_SECONDS = 120.0
MEMORY = 12 << 30  # address space of the reading process: a damaged length must not allocate it
# A value in JSON, and what takes its place.
VALUE = re.compile(rb'-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?|"[^"]*"|null|true|false')
STRANGE = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-1",
    b"0",
    str(2**70).encode(),
    b"null",
    b'""',
    b"[]",
    b"{}",
    b"true",
)
GOOD = ("refused", "same", "rebuilt", "read")
BAD = ("different", "unclear", "exception", "died", "hang")


@dataclass(frozen=True)
class Artefact:
    """Something on disk. ``kinds`` are the files to damage, by kind; ``read`` says what came of a copy."""

    name: str
    kinds: dict[str, list[str]]
    pristine: Path
    read: Callable[[Path, dict[str, Any]], str]
    command: Callable[[Path, Path], list[str]] | None = None


@dataclass(frozen=True)
class Trial:
    """One damaged copy: of an artefact, one file of this kind."""

    artefact: str
    kind: str
    number: int


def damage(raw: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Damaged bytes, and what was done to them."""
    while True:
        kind = str(rng.choice(["bit", "byte", "run", "cut", "zeroed", "longer", "value"]))
        at = int(rng.integers(max(len(raw), 1)))
        new = bytearray(raw)
        if kind == "longer" or not raw:
            new += rng.bytes(int(rng.integers(1, 65)))
        elif kind == "bit":
            new[at] ^= 1 << int(rng.integers(8))
        elif kind == "byte":
            new[at] = int(rng.integers(256))
        elif kind == "run":
            length = min(int(rng.integers(2, 65)), len(raw) - at)
            new[at : at + length] = rng.bytes(length)
        elif kind == "cut":
            del new[at:]
        elif kind == "value":
            found = list(VALUE.finditer(raw)) if raw[:1] in b"{[" else []
            if not found:
                continue
            at, end = found[int(rng.integers(len(found)))].span()
            new[at:end] = STRANGE[int(rng.integers(len(STRANGE)))]
        else:
            at -= at % PAGE
            new[at : at + PAGE] = bytes(len(raw[at : at + PAGE]))
        if bytes(new) != raw:
            return bytes(new), f"{kind} at {at} of {len(raw)}"


# What reads each artefact. ``facts`` holds the digests of the undamaged results.


def read_encoded(folder: Path, facts: dict[str, Any]) -> str:
    """``mldcn fit`` finds encoded rows beside the run."""
    from mldcn.config import load_config
    from mldcn.data.prepare import prepare

    config = load_config(facts["config"], [f"data.encoded={folder}"])
    data = prepare(config, folder)
    if digest_encoded(data) != facts["encoded"]:
        return "different"
    return "same" if data.reused else "rebuilt"


def read_partial(folder: Path, facts: dict[str, Any]) -> str:
    """``mldcn data encode`` goes on with what an interrupted one left in ``<folder>.partial``."""
    from mldcn.config import load_config
    from mldcn.data.prepare import prepare

    whole = folder.with_name(f"{folder.name}-whole")
    shutil.rmtree(whole, ignore_errors=True)
    folder.rename(whole.with_name(f"{whole.name}.partial"))
    data = prepare(load_config(facts["config"], [f"data.encoded={whole}"]), whole)
    same = digest_encoded(data) == facts["encoded"] and digest_files(whole) == facts["encoded_files"]
    return "same" if same else "different"


def read_study(folder: Path, facts: dict[str, Any]) -> str:
    """``mldcn study`` again, with all its runs finished: it only has to sum them up."""
    from mldcn.study.engine import run_study
    from mldcn.study.recipe import load_recipe

    run_study(load_recipe(folder.parent.parent / "study.yaml"), None, folder)
    return "same" if digest_study(folder) == facts["study"] else "different"


def read_checkpoint(folder: Path, facts: dict[str, Any]) -> str:
    """``mldcn fit --resume``: loads the state alone, since :func:`read_interrupted` goes on from it."""
    from mldcn.training.checkpoint import load_checkpoint

    loaded = load_checkpoint(folder)
    if loaded is None:
        return "rebuilt"  # the run starts anew
    found = digest_state(loaded.state)
    return "same" if found == facts["states"][0] else "rebuilt" if found in facts["states"] else "different"


def digest_state(state: Any) -> str:
    """A digest of nested plain data and tensors."""

    def parts(value: Any) -> Iterator[bytes]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield f"<{key!r}>".encode()
                yield from parts(item)
        elif isinstance(value, list | tuple):
            for item in value:
                yield b"<item>"
                yield from parts(item)
        else:
            yield value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode()

    return digest_bytes(parts(state))


def read_interrupted(folder: Path, facts: dict[str, Any]) -> str:
    """``mldcn fit --resume`` to the end."""
    from mldcn import workflow
    from mldcn.config import load_config
    from mldcn.run import RunFolder
    from mldcn.training.identity import what_counts

    run = RunFolder.open(folder, finished=False)
    workflow.train(load_config(run.config), run, resume=True)
    RunFolder.open(folder)
    # Threads and places may be others than at the beginning; all else of the config may not.
    digests = digest_results(folder) | {"config.yaml": facts["results"]["config.yaml"]}
    then, now = (what_counts(load_config(path)) for path in (facts["run_config"], run.config))
    return "same" if digests == facts["results"] and then == now else "different"


def read_run(folder: Path, facts: dict[str, Any]) -> str:
    """``mldcn predict``, ``evaluate`` and ``compare``."""
    return "same" if use_run(folder, Path(facts["log"])) == facts["used"] else "different"


def use_run(folder: Path, log: Path) -> str:
    """A digest of what a run predicts, and of what it says of itself."""
    import pyarrow.parquet as pq

    from mldcn.comparison import read_predictions
    from mldcn.predict import Predictor
    from mldcn.run import RunFolder

    run = RunFolder.open(folder)
    scores = Predictor(run).predict_table(pq.read_table(log).slice(0, 300))
    table = read_predictions(run.predictions)
    columns = [table[name].to_numpy().tobytes() for name in table.column_names]
    said = json.dumps(run.read_json("metrics.json"), sort_keys=True)
    return digest_bytes([scores.tobytes(), said.encode(), *columns])


def read_log(folder: Path, facts: dict[str, Any]) -> str:
    """``mldcn fit`` on a raw log."""
    from mldcn.config import load_config
    from mldcn.data.prepare import prepare

    log = next(folder.glob("log*"))
    config = load_config(facts["config"], [f"data.train=[{log}]"])
    found = digest_encoded(prepare(config, folder / "encoded"))
    if found == facts["encoded"]:
        return "same"
    return "different" if log.suffix == ".gz" else "read"  # the frames of this .zst have no checksum


def build(work: Path, rows: int, skip: Sequence[str] = ()) -> None:
    """Makes one undamaged artefact of each kind, but those that are skipped."""
    import polars as pl

    from mldcn import workflow
    from mldcn.config import load_config
    from mldcn.data.prepare import prepare
    from mldcn.run import RunFolder
    from mldcn.training.checkpoint import load_checkpoint
    from mldcn.training.observers import Observer

    class Stop(Observer):
        """Ends a run at its second evaluation, as Ctrl-C would."""

        seen = 0

        def evaluated(self, step: int, metrics: Any, *, best: bool) -> None:
            self.seen += 1
            if self.seen == 2:
                raise KeyboardInterrupt

    # With this min_delta the first weights stay the best: a resumed run needs them.
    path = write_small_log(work / "log", rows, min_delta=1.0)
    config = load_config(path)
    data = prepare(config, work / "log" / "encoded")
    shutil.copytree(work / "log" / "encoded", work / "encoded")
    build_partial(path, work / "partial")
    if "study" not in skip:
        build_study(path, work)
    workflow.train(config, RunFolder.create(work / "run"))
    with contextlib.suppress(KeyboardInterrupt):
        workflow.train(config, RunFolder.create(work / "interrupted"), observers=[Stop()])
    checkpoints = work / "interrupted" / "checkpoints"
    shutil.copytree(checkpoints, work / "checkpoint")
    older = work / "older"
    shutil.copytree(checkpoints, older)
    states = []
    while loaded := load_checkpoint(older):
        states.append(digest_state(loaded.state))
        shutil.rmtree(sorted(older.glob("step-*"))[-1])
    log = work / "log" / "pinads.parquet"
    write_raw_logs(pl.read_parquet(log), work)
    facts = {
        "config": str(path),
        "run_config": str(work / "run" / "config.yaml"),
        "log": str(log),
        "encoded": digest_encoded(data),
        "encoded_files": digest_files(work / "encoded"),
        "study": digest_study(work / "study") if "study" not in skip else None,
        "states": states,
        "results": digest_results(work / "run"),
        "used": use_run(work / "run", log),
    }
    (work / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def build_partial(path: Path, folder: Path) -> None:
    """What an encoding leaves that is cut off in its second half, having noted all it had done."""
    from mldcn.config import load_config
    from mldcn.data import prepare

    blocks = 0

    def cut_off(stage: str, *_: int) -> None:
        nonlocal blocks
        blocks += stage == "encode"
        if blocks == 3:
            raise KeyboardInterrupt

    usual, prepare.CHECKPOINT_SECONDS = prepare.CHECKPOINT_SECONDS, 0.0
    with contextlib.suppress(KeyboardInterrupt):
        prepare.prepare(load_config(path), folder.with_name("cut-off"), cut_off)
    prepare.CHECKPOINT_SECONDS = usual
    folder.with_name("cut-off.partial").rename(folder)


def build_study(path: Path, work: Path) -> None:
    """A study of one rival and two seeds."""
    from mldcn.study.engine import run_study
    from mldcn.study.recipe import load_recipe

    write_small_study(path, work / "study.yaml")
    run_study(load_recipe(work / "study.yaml"), path.parent, work / "study")


def write_raw_logs(frame: Any, work: Path) -> None:
    """The log as text, packed text and Parquet, each in a folder of its own."""
    import io

    import polars as pl
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = [name for name, kind in frame.schema.items() if isinstance(kind, pl.List)]
    texts = [pl.col(name).cast(pl.List(pl.String)).list.join("|") for name in lists]
    text = io.BytesIO()
    frame.with_columns(pl.when(t.str.len_bytes() > 0).then(t) for t in texts).write_csv(text)
    raw = text.getvalue()
    packed = io.BytesIO()
    pq.write_table(frame.to_arrow(), packed, row_group_size=1000, write_page_checksum=True)
    logs = {
        "log.csv": raw,
        "log.csv.gz": gzip.compress(raw, mtime=0),
        "log.csv.zst": bytes(pa.compress(raw, codec="zstd", asbytes=True)),
        "log.parquet": packed.getvalue(),
    }
    for name, content in logs.items():
        (work / f"raw-{name}").mkdir()
        (work / f"raw-{name}" / name).write_bytes(content)


def artefacts(work: Path) -> dict[str, Artefact]:
    """Everything that is damaged."""

    def made(name: str, read: Any, command: Any = None, skip: tuple[str, ...] = ()) -> Artefact:
        folder, kinds = work / name, dict[str, list[str]]()
        for file in sorted(folder.rglob("*")):
            relative = str(file.relative_to(folder))
            if file.is_file() and not relative.startswith(skip):
                kind = re.sub(r"[0-9]{2,}", "N", re.sub("^(.*/)?(train|valid|test)/", r"\1PART/", relative))
                kinds.setdefault(kind, []).append(relative)
        return Artefact(name, kinds, folder, read, command)

    def resume(copy: Path, work: Path) -> list[str]:
        return ["fit", "--resume", str(copy)]

    def predict(copy: Path, work: Path) -> list[str]:
        log = work / "log" / "pinads.parquet"
        return ["predict", str(copy), str(log), "--out", str(copy.parent / "scores.csv")]

    def fit(copy: Path, work: Path) -> list[str]:
        config = work / "log" / "config.yaml"
        out = ["--out", str(copy.parent / "fitted"), "--force"]
        return ["fit", str(config), *out, "--set", f"data.encoded={copy}"]

    found = [
        made("encoded", read_encoded, fit),
        made("partial", read_partial),
        made("checkpoint", read_checkpoint),
        made("interrupted", read_interrupted, resume),
        # Pages for people: no command reads them.
        made("run", read_run, predict, skip=("report.html", "tensorboard")),
        # The config is the user's own text; encoded rows come above.
        made("study", read_study, skip=("dataset.yaml", "encoded")),
        *(made(f"raw-log.{kind}", read_log) for kind in ("csv", "csv.gz", "csv.zst", "parquet")),
    ]
    return {artefact.name: artefact for artefact in found if artefact.kinds}


def damaged_copy(artefact: Artefact, trial: Trial, seed: int, folder: Path) -> str:
    """Copies an artefact into ``folder`` and damages one file; says how."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(artefact.pristine, folder)
    name = zlib.crc32(f"{trial.artefact}/{trial.kind}".encode())
    rng = np.random.default_rng([seed, name, trial.number])
    files = artefact.kinds[trial.kind]
    file = files[int(rng.integers(len(files)))]
    raw, how = damage((artefact.pristine / file).read_bytes(), rng)
    (folder / file).write_bytes(raw)
    return f"{file}: {how}"


def judge(artefact: Artefact, folder: Path, facts: dict[str, Any]) -> tuple[str, str]:
    """What came of reading a damaged copy, and the message."""
    from mldcn.errors import UserError

    try:
        return artefact.read(folder, facts), ""
    except UserError as error:
        # A clear error names a file of the artefact, or the artefact itself.
        return ("refused" if folder.name in str(error) else "unclear"), str(error)
    except Exception:
        return "exception", traceback.format_exc()


def worker(work: Path, trials: list[Trial], seed: int, pipe: Any) -> None:
    """Reads damaged copies, one after the other; the parent sees which one ended the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    facts = json.loads((work / "facts.json").read_text(encoding="utf-8"))
    known = artefacts(work)
    for trial in trials:
        folder = work / "copies" / f"damaged-{trial.artefact}"
        how = damaged_copy(known[trial.artefact], trial, seed, folder)
        pipe.send(how)
        pipe.send(judge(known[trial.artefact], folder, facts))
    pipe.close()


def in_process(target: Callable[..., None], *arguments: Any) -> Any:
    """Starts a fresh process: one that is forked would inherit locks of thread pools."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def run_trials(work: Path, trials: list[Trial], seed: int) -> Iterator[tuple[Trial, str, str, str]]:
    """Each trial with what was done, what came of it and the message."""
    waiting = list(trials)
    while waiting:
        mine, theirs = multiprocessing.get_context("spawn").Pipe()
        process = in_process(worker, work, waiting, seed, theirs)
        theirs.close()
        how = "while it started"
        try:
            while waiting:
                try:
                    if not mine.poll(HANG_SECONDS):
                        outcome = ("hang", f"nothing for {HANG_SECONDS:g} s")
                    else:
                        how = mine.recv()
                        hung = not mine.poll(HANG_SECONDS)
                        outcome = ("hang", f"nothing for {HANG_SECONDS:g} s") if hung else mine.recv()
                except EOFError:
                    process.join()
                    outcome = ("died", f"exit code {process.exitcode}")
                yield waiting.pop(0), how, *outcome
                if outcome[0] in ("hang", "died"):
                    break
        finally:
            process.kill()
            process.join()


def through_the_command_line(
    work: Path, seed: int, copies: int, only: str | None
) -> Iterator[tuple[Trial, str, str, str]]:
    """A few trials as the shell sees them: exit code 0 or 1, one message, no traceback."""
    rng = np.random.default_rng([seed, 1])
    for artefact in artefacts(work).values():
        if artefact.command is None or not f"{artefact.name}/".startswith((only or "").partition("/")[0]):
            continue
        for number in range(copies):
            trial = Trial(artefact.name, str(rng.choice(np.array(list(artefact.kinds)))), number)
            copy = work / "copies" / f"damaged-{artefact.name}"
            how = damaged_copy(artefact, trial, seed, copy)
            try:
                done = subprocess.run(
                    [*mldcn_command(), *artefact.command(copy, work)],
                    capture_output=True,
                    text=True,
                    env=command_environment(),
                    timeout=HANG_SECONDS,
                )
            except subprocess.TimeoutExpired:
                yield trial, how, "hang", f"nothing for {HANG_SECONDS:g} s"
                continue
            traced = "Traceback" in done.stderr or "internal error" in done.stderr
            if traced or done.returncode not in (0, 1):
                yield trial, how, "exception", done.stderr
            elif done.returncode == 1:
                lines = done.stderr.splitlines()  # those on its progress come first
                clear = any(line.startswith("mldcn: ") and copy.name in line for line in lines)
                yield trial, how, "refused" if clear else "unclear", done.stderr
            else:
                yield trial, how, "read", ""


def check(
    work: Path,
    *,
    copies: int,
    rows: int = 3000,
    first: int = 0,
    seed: int = 0,
    only: str | None = None,
    skip: Sequence[str] = (),
    commands: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[dict[tuple[str, str], Counter[str]], list[str]]:
    """Runs everything.

    Args:
        work: an empty folder.
        copies: of every artefact, each with another of its files damaged in turn.
        rows: of the log that they are made from.
        first: number of the first copy.
        seed: of the damage.
        only: ``artefact/kind``, or the beginning of it.
        skip: artefacts to leave out.
        commands: copies of each artefact that go through the command line too.
        say: told how far it is, after every hundred copies.

    Returns:
        For each kind of file how often what came of it, and the violations, ready to print.
    """
    builder = in_process(build, work, rows, skip)
    builder.join()
    if builder.exitcode:
        raise RuntimeError("the undamaged artefacts could not be made")
    trials = []
    for artefact in artefacts(work).values():
        kinds = [kind for kind in artefact.kinds if f"{artefact.name}/{kind}".startswith(only or "")]
        if kinds and artefact.name not in skip:
            numbers = range(first, first + copies)
            trials += [Trial(artefact.name, kinds[number % len(kinds)], number) for number in numbers]
    counts: dict[tuple[str, str], Counter[str]] = {}
    violations = []

    def note(trial: Trial, how: str, outcome: str, message: str, name: str) -> None:
        counts.setdefault((name, trial.kind), Counter())[outcome] += 1
        if outcome in BAD:
            violations.append(
                f"{name}/{trial.kind}: {outcome}; {how}; again with --seed {seed} --only "
                f"{trial.artefact}/{trial.kind} --first {trial.number} --copies 1\n{message}".rstrip()
            )

    for done, (trial, *found) in enumerate(run_trials(work, trials, seed), start=1):
        note(trial, *found, trial.artefact)
        if done % 100 == 0:
            say(f"{done:,} of {len(trials):,} copies, {len(violations)} violations; now {trial.artefact}")
    for trial, *found in through_the_command_line(work, seed, commands, only):
        note(trial, *found, f"{trial.artefact} (command)")
    return counts, violations


def main() -> int:
    """Prints what came of every kind of file; the exit code is 1 where something must not have happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--copies", type=int, default=1000, help="of every artefact, its files damaged in turn"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first copy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="artefact/kind of file, or the beginning of it")
    parser.add_argument("--commands", type=int, default=0, help="copies that go through the command line")
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="mldcn-corrupt-") as folder:
        counts, violations = check(Path(folder), **options, say=lambda line: print(line, file=sys.stderr))
    outcomes = [o for o in (*GOOD, *BAD) if any(counter[o] for counter in counts.values())]
    rows = [[name, kind, *(counter[o] or "" for o in outcomes)] for (name, kind), counter in counts.items()]
    print(markdown(["artefact", "file", *outcomes], rows))
    for violation in violations[:50]:
        print(f"\n{violation}")
    print(f"\n{sum(map(Counter.total, counts.values())):,} damaged copies, {len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
