"""MovieLens: a rating of 4 or more is the positive label, as CTR papers on this log have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from mldcn.datasets.source import Prepared, Source, categorical, double_colon, sink, text
from mldcn.errors import UserError

POSITIVE_RATING = 4.0
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_YEAR = pl.col("title").str.extract(r"\((\d{4})\)\s*$")


def prepare_1m(path: Path, out: Path) -> Prepared:
    """``ratings.dat``, ``users.dat`` and ``movies.dat`` joined into one log of 8 categorical fields.

    A file ``interactions.csv`` (or ``.csv.gz``) with ``user_id, movie_id, label`` may stand in for
    ``ratings.dat``; its further columns (``split``, say) are kept, so that the config can split by one.
    """
    source = Source(path, out / "raw")
    users = double_colon(source.need("users.dat"), ("user_id", "gender", "age", "occupation", "zip"))
    movies = double_colon(source.need("movies.dat"), ("movie_id", "title", "genres"))
    movies = movies.select("movie_id", "genres", year=_YEAR)
    ratings_file = source.one("ratings.dat")
    if ratings_file is not None:
        ratings = _rated(double_colon(ratings_file, ("user_id", "movie_id", "rating", "timestamp")))
    else:
        ratings_file = source.need("ratings.dat", "interactions.csv", "interactions.csv.gz")
        ratings = _interactions(ratings_file)
    joined = ratings.join(users, on="user_id", how="left", maintain_order="left")
    joined = joined.join(movies, on="movie_id", how="left", maintain_order="left")
    log = sink(joined, out / "movielens-1m.parquet", ratings_file)
    timed = source.one("ratings.dat") is not None
    return [log], _config(log, ("gender", "age", "occupation", "zip"), timed=timed)


def prepare_100k(path: Path, out: Path) -> Prepared:
    """``u.data``, ``u.user`` and ``u.item`` joined into one log of 8 categorical fields."""
    source = Source(path, out / "raw")
    ratings_file = source.need("u.data")
    names = ("user_id", "movie_id", "rating", "timestamp")
    ratings = _rated(text(ratings_file, separator="\t", columns=names))
    users = text(
        source.need("u.user"), separator="|", columns=("user_id", "age", "gender", "occupation", "zip")
    )
    flags = tuple(f"genre_{number}" for number in range(len(GENRES_100K)))
    head = ("movie_id", "title", "release", "video_release", "url")
    movies = text(source.need("u.item"), separator="|", columns=head + flags)
    named = [
        pl.when(pl.col(flag) == "1").then(pl.lit(genre))
        for flag, genre in zip(flags, GENRES_100K, strict=True)
    ]
    genres = pl.concat_str(named, separator="|", ignore_nulls=True)
    movies = movies.select("movie_id", genres=genres, year=_YEAR)
    joined = ratings.join(users, on="user_id", how="left", maintain_order="left")
    joined = joined.join(movies, on="movie_id", how="left", maintain_order="left")
    log = sink(joined, out / "movielens-100k.parquet", ratings_file)
    return [log], _config(log, ("gender", "age", "occupation", "zip"), timed=True)


def prepare_20m(path: Path, out: Path) -> Prepared:
    """``ratings.csv`` and ``movies.csv`` joined into one log of 4 categorical fields (users are bare ids)."""
    source = Source(path, out / "raw")
    ratings_file = source.need("ratings.csv")
    ratings = text(ratings_file).rename({"userId": "user_id", "movieId": "movie_id"}, strict=False)
    movies = text(source.need("movies.csv")).rename({"movieId": "movie_id"}, strict=False)
    genres = pl.col("genres").replace("(no genres listed)", None)
    movies = movies.select("movie_id", genres=genres, year=_YEAR)
    joined = _rated(ratings).join(movies, on="movie_id", how="left", maintain_order="left")
    log = sink(joined, out / "movielens-20m.parquet", ratings_file)
    return [log], _config(log, (), timed=True)


def _rated(ratings: pl.LazyFrame) -> pl.LazyFrame:
    rating = pl.col("rating").cast(pl.Float64)
    return ratings.select(
        "user_id",
        "movie_id",
        rating,
        pl.col("timestamp").cast(pl.Int64),
        label=(rating >= POSITIVE_RATING).cast(pl.Int8),
    )


def _interactions(path: Path) -> pl.LazyFrame:
    frame = text(path)
    missing = {"user_id", "movie_id", "label"} - set(frame.collect_schema().names())
    if missing:
        raise UserError(f"{path}: has no column {', '.join(sorted(missing))}")
    kept = frame.collect_schema().names()
    numbers = [name for name in ("rating", "timestamp") if name in kept]
    return frame.with_columns(pl.col("label").cast(pl.Int8), pl.col(numbers).cast(pl.Float64))


def _config(log: Path, of_user: tuple[str, ...], *, timed: bool) -> dict[str, Any]:
    genres = {"name": "genres", "kind": "multi", "source": "item", "delimiter": "|", "max_length": 8}
    schema: dict[str, Any] = {
        "features": [
            *categorical(("user_id", *of_user), "user"),
            *categorical(("movie_id", "year"), "item"),
            genres,
        ],
        "labels": [{"name": "label"}],
        "user": "user_id",
    }
    if timed:
        schema["time"] = "timestamp"
    split = {"kind": "hash", "columns": ["user_id", "movie_id"], "valid": 0.1, "test": 0.1}
    return {"data": {"train": [str(log)], "split": split}, "schema": schema}
