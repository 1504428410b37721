"""The logs that ``mldcn data`` knows by name: where they come from, under which terms, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mldcn.config import suggest
from mldcn.datasets.ads import prepare_avazu, prepare_criteo_1tb, prepare_criteo_kaggle
from mldcn.datasets.apps import prepare_frappe, prepare_kuairand
from mldcn.datasets.download import Progress, download, published_md5
from mldcn.datasets.movielens import prepare_1m, prepare_20m, prepare_100k
from mldcn.datasets.pinads import pinads_config, write_log
from mldcn.datasets.source import Prepare, Prepared
from mldcn.errors import UserError

PINADS_SIZE = 300_000


@dataclass(frozen=True)
class Dataset:
    """A named log. ``url`` is set only where the publisher lets everybody download it without a form."""

    name: str
    title: str
    licence: str
    citation: str
    homepage: str
    by_hand: str
    prepare: Prepare
    url: str | None = None
    size: int | None = None  # bytes of the file at url, where known
    md5: str | None = None  # of the same, as the publisher gives it
    md5_url: str | None = None  # where the publisher gives it, if it is not known here
    note: str = ""

    @property
    def downloadable(self) -> bool:
        """Whether :func:`fetch` can get it."""
        return self.url is not None or self.name == "pinads"

    def describe(self) -> str:
        """What it is, its terms, and how to get it, as text."""
        lines = [
            f"{self.name}: {self.title}",
            f"licence:  {self.licence}",
            f"cite:     {self.citation}",
            f"homepage: {self.homepage}",
        ]
        if self.url is not None:
            size = f" ({self.size / 1e6:,.1f} MB)" if self.size else ""
            lines.append(f"download: {self.url}{size}")
        lines.append(f"get it:   {self.by_hand}")
        if self.note:
            lines.append(f"note:     {self.note}")
        return "\n".join(lines)


def list_datasets() -> list[Dataset]:
    """All named logs."""
    return list(_DATASETS)


def dataset(name: str) -> Dataset:
    """The named log.

    Raises:
        UserError: there is none of that name; the nearest is told.
    """
    for entry in _DATASETS:
        if entry.name == name:
            return entry
    raise UserError(f"{name}: no such log{suggest(name, [entry.name for entry in _DATASETS])}")


def fetch(
    name: str, folder: str | Path, source: str | Path | None = None, progress: Progress | None = None
) -> Path | None:
    """Gets a log's raw files: the user's own (``source``), or the publisher's, checked and resumed.

    Args:
        name: of the log.
        folder: for a download.
        source: the user's file, archive or folder; nothing is fetched then.
        progress: is called with (bytes done, bytes in all).

    Returns:
        What :func:`prepare` takes: a path, or None for a log that is generated.

    Raises:
        UserError: the log must be got by hand (the message says how), or the download failed.
    """
    entry = dataset(name)
    if source is not None:
        if not Path(source).exists():
            raise UserError(f"{source}: no such file or folder")
        return Path(source)
    if name == "pinads":
        return None
    if entry.url is None:
        raise UserError(
            f"{name}: its publisher allows no direct download. {entry.by_hand}. Then give the file or folder: "
            f"mldcn data fetch {name} --source PATH"
        )
    target = Path(folder) / entry.url.rsplit("/", 1)[-1]
    md5 = entry.md5
    if md5 is None and entry.md5_url is not None:
        md5 = published_md5(entry.md5_url, target.name)
    return download(entry.url, target, size=entry.size, md5=md5, progress=progress)


def prepare(name: str, path: str | Path | None, out: str | Path) -> Prepared:
    """Turns a publisher's files into a log and a ready config.

    Args:
        name: of the log.
        path: the publisher's file, archive or folder. For ``pinads`` a folder with a log that was generated
            before, or nothing.
        out: folder for the joined log; where none needs to be made, the files stay where they are.

    Returns:
        The log's files and the config as plain data for ``mldcn.config.parse``.

    Raises:
        UserError: a file is missing, or is not in the publisher's format.
    """
    entry = dataset(name)
    if path is None and name != "pinads":
        raise UserError(f"{name}: give the publisher's file or folder; {entry.by_hand}")
    return entry.prepare(Path(path) if path is not None else Path(out), Path(out))


def _prepare_pinads(path: Path, out: Path) -> tuple[list[Path], dict[str, Any]]:
    if not (path / "pinads.parquet").is_file():
        if path != out:
            raise UserError(f"{path}: no folder with a generated log (pinads.parquet is missing)")
        write_log(out, PINADS_SIZE)
    return [path / "pinads.parquet"], pinads_config(path)


_GROUPLENS = "research use, no redistribution, no commercial use without permission (GroupLens)"
_HARPER = (
    "F. M. Harper and J. A. Konstan. The MovieLens Datasets: History and Context. "
    "ACM Transactions on Interactive Intelligent Systems 5(4), 2015"
)
_KAGGLE = "needs an account and the contest's rules accepted"

_DATASETS = (
    Dataset(
        name="pinads",
        title="synthetic ad impressions with known true probabilities (click, good click, outbound, save)",
        licence="Apache-2.0, as this package",
        citation="this package",
        homepage="none",
        by_hand=f"generated here ({PINADS_SIZE:,} impressions; the Python API writes any size)",
        prepare=_prepare_pinads,
    ),
    Dataset(
        name="movielens-100k",
        title="100,000 ratings of 1,682 movies by 943 users; positive: rating >= 4",
        licence=_GROUPLENS,
        citation=_HARPER,
        homepage="https://grouplens.org/datasets/movielens/100k/",
        by_hand="fetched, or give ml-100k.zip, or the folder with u.data, u.user and u.item",
        prepare=prepare_100k,
        url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        size=4_924_029,
        md5="0e33842e24a9c977be4e0107933c0723",
    ),
    Dataset(
        name="movielens-1m",
        title="1,000,209 ratings of 3,900 movies by 6,040 users; positive: rating >= 4",
        licence=_GROUPLENS,
        citation=_HARPER,
        homepage="https://grouplens.org/datasets/movielens/1m/",
        by_hand="fetched, or give ml-1m.zip, or the folder with ratings.dat, users.dat and movies.dat",
        prepare=prepare_1m,
        url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        md5="c4d9eecfca2ab87c1945afe126590906",
        note="rows with rating 3 count as negative and are kept; many papers drop them, so figures differ",
    ),
    Dataset(
        name="movielens-20m",
        title="20,000,263 ratings of 27,278 movies by 138,493 users; positive: rating >= 4",
        licence=_GROUPLENS,
        citation=_HARPER,
        homepage="https://grouplens.org/datasets/movielens/20m/",
        by_hand="fetched, or give ml-20m.zip, or the folder with ratings.csv and movies.csv",
        prepare=prepare_20m,
        url="https://files.grouplens.org/datasets/movielens/ml-20m.zip",
        size=198_702_078,
        md5="cd245b17a1ae2cc31bb14903e1204af3",
    ),
    Dataset(
        name="criteo-kaggle",
        title="Criteo Display Advertising Challenge: 45,840,617 ad impressions of 7 days; click",
        licence="Criteo's terms: research, non-commercial, no redistribution",
        citation="Criteo Labs. Display Advertising Challenge, Kaggle, 2014",
        homepage="https://www.kaggle.com/c/criteo-display-ad-challenge",
        by_hand="Download the challenge's archive from Criteo AI Lab (ailab.criteo.com) after accepting its "
        "terms, and give train.txt (or .gz, or the .tar.gz)",
        prepare=prepare_criteo_kaggle,
        note="ids seen fewer than 10 times share a row (2 in a sample below 100 MB); split by order 8:1:1",
    ),
    Dataset(
        name="criteo-1tb",
        title="Criteo 1 TB click logs: 24 days, some 4.4 billion ad impressions; click",
        licence="CC BY-NC-SA 4.0 (Criteo)",
        citation="Criteo AI Lab. Criteo 1TB Click Logs dataset, 2013",
        homepage="https://ailab.criteo.com/criteo-1tb-click-logs-dataset/",
        by_hand="Download day_0.gz … day_23.gz (or some of them) from Criteo AI Lab, and give their folder",
        prepare=prepare_criteo_1tb,
        note="the days are read in place and in order; hash the categorical fields if memory is short",
    ),
    Dataset(
        name="avazu",
        title="Avazu CTR contest: 40,428,967 mobile ad impressions of 10 days; click",
        licence="Kaggle contest rules: research, non-commercial",
        citation="Avazu. Click-Through Rate Prediction, Kaggle, 2014",
        homepage="https://www.kaggle.com/c/avazu-ctr-prediction",
        by_hand=f"Download train.gz from Kaggle ({_KAGGLE}), and give it",
        prepare=prepare_avazu,
    ),
    Dataset(
        name="frappe",
        title="96,203 app launches of 957 users and 4,082 apps in context, with 2 sampled negatives each",
        licence="research use (see the publisher's page)",
        citation="L. Baltrunas, K. Church, A. Karatzoglou and N. Oliver. Frappe: Understanding the Usage and "
        "Perception of Mobile App Recommendations In-The-Wild. arXiv:1505.03014, 2015",
        homepage="https://www.baltrunas.info/context-aware",
        by_hand="Download the archive from the homepage, unpack it, and give frappe.csv",
        prepare=prepare_frappe,
        note="the publisher's file holds positives only; negatives are drawn here, and AUC depends on them",
    ),
    Dataset(
        name="kuairand",
        title="KuaiRand: short-video impressions of Kuaishou; click, long view, like (Pure, 1K or 27K)",
        licence="CC BY-SA 4.0",
        citation="C. Gao et al. KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed "
        "Videos. CIKM 2022",
        homepage="https://kuairand.com",
        by_hand="Pure is fetched; for 1K and 27K download from the homepage and give the archive or folder",
        prepare=prepare_kuairand,
        url="https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz",
        size=47_432_272,
        md5_url="https://zenodo.org/api/records/10439422",
        note="long_view and like are labels of every impression, clicked or not",
    ),
)
