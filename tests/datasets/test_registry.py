"""Named logs: from the publishers' files (tiny ones of the same format here) to a log and a config that fits."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import polars as pl
import pytest

from mldcn.config import Config, parse
from mldcn.datasets import dataset, fetch, list_datasets, prepare
from mldcn.errors import UserError

USERS_1M = "1::F::1::10::48067\n2::M::56::16::70072\n"
MOVIES_1M = (
    "1::Toy Story (1995)::Animation|Children's|Comedy\n"
    "2::Misérables, Les (1998)::Drama\n"
    "3::Seven (a.k.a. Se7en) (1995)::Crime|Thriller\n"
)
RATINGS_1M = "1::1::5::978300019\n1::2::3::978300055\n2::3::4::978300100\n2::1::1::978300200\n"


def config_of(raw: dict, log: pl.DataFrame | None = None) -> Config:
    config = parse(Config, raw, "test")
    if log is not None:
        assert set(config.log_schema.columns()) <= set(log.columns)
    return config


def real(folder: str) -> Path:
    root = os.environ.get("MLDCN_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data"
    path = Path(root) / folder
    if not path.exists():
        pytest.skip(f"no real data at {path}; name its folder in MLDCN_TEST_DATA")
    return path


def write(folder: Path, files: dict[str, str], encoding: str = "utf-8") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding=encoding)
    return folder


def test_every_named_log_tells_its_terms():
    names = [entry.name for entry in list_datasets()]
    assert names == [
        "pinads", "movielens-100k", "movielens-1m", "movielens-20m", "criteo-kaggle", "criteo-1tb", "avazu",
        "frappe", "kuairand",
    ]  # fmt: skip
    for entry in list_datasets():
        told = entry.describe()
        assert entry.licence in told
        assert entry.citation in told
        assert entry.by_hand in told
        assert entry.url is None or entry.md5 or entry.md5_url
    assert not dataset("criteo-kaggle").downloadable


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(UserError, match="did you mean 'movielens-1m'"):
        dataset("movielens1m")


def test_a_log_that_is_got_by_hand_says_how(tmp_path):
    with pytest.raises(UserError, match=r"allows no direct download.*Kaggle.*--source"):
        fetch("avazu", tmp_path)
    with pytest.raises(UserError, match="no such file"):
        fetch("avazu", tmp_path, source=tmp_path / "absent")
    assert fetch("avazu", tmp_path, source=tmp_path) == tmp_path
    with pytest.raises(UserError, match="give the publisher's file"):
        prepare("avazu", None, tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_movielens_1m(tmp_path, packed):
    files = {"users.dat": USERS_1M, "movies.dat": MOVIES_1M, "ratings.dat": RATINGS_1M}
    if packed:
        path = tmp_path / "ml-1m.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(f"ml-1m/{name}", content.encode("latin-1"))
    else:
        path = write(tmp_path / "ml-1m", files, "latin-1")
    (log,), raw = prepare("movielens-1m", path, tmp_path / "out")
    frame = pl.read_parquet(log)
    assert frame["user_id"].to_list() == ["1", "1", "2", "2"]
    assert frame["label"].to_list() == [1, 0, 1, 0]
    assert frame["year"].to_list() == ["1995", "1998", "1995", "1995"]
    assert frame["genres"].to_list()[2] == "Crime|Thriller"
    assert frame["zip"].to_list() == ["48067", "48067", "70072", "70072"]
    assert frame["timestamp"].to_list()[0] == 978300019
    config = config_of(raw, frame)
    assert {f.name for f in config.log_schema.features} == {
        "user_id", "movie_id", "gender", "age", "occupation", "zip", "year", "genres",
    }  # fmt: skip
    assert config.data.split.kind == "hash"


def test_movielens_1m_takes_an_interactions_file_with_a_split(tmp_path):
    folder = write(tmp_path / "ml", {"users.dat": USERS_1M, "movies.dat": MOVIES_1M}, "latin-1")
    lines = "user_id,movie_id,pos,label,rating,timestamp,split\n1,1,0,1,5,978300019,train\n2,3,0,0,,,test\n"
    with gzip.open(folder / "interactions.csv.gz", "wt") as file:
        file.write(lines)
    (log,), raw = prepare("movielens-1m", folder, tmp_path / "out")
    frame = pl.read_parquet(log)
    assert frame["label"].to_list() == [1, 0]
    assert frame["split"].to_list() == ["train", "test"]
    assert frame["rating"].to_list() == [5.0, None]
    assert config_of(raw, frame).log_schema.time is None


def test_movielens_100k(tmp_path):
    flags = ["0"] * 19
    flags[1] = flags[5] = "1"
    none = "|".join(["0"] * 19)
    folder = write(
        tmp_path / "ml-100k",
        {
            "u.data": "196\t242\t3\t881250949\n186\t302\t4\t891717742\n",
            "u.user": "196|49|M|writer|55105\n186|39|F|executive|00000\n",
            "u.item": f"242|Kolya (1996)|24-Jan-1997||http://x|{'|'.join(flags)}\n302|unknown||||{none}\n",
        },
        "latin-1",
    )
    (log,), raw = prepare("movielens-100k", folder, tmp_path / "out")
    frame = pl.read_parquet(log)
    assert frame["label"].to_list() == [0, 1]
    assert frame["genres"].to_list() == ["Action|Comedy", ""]
    assert frame["year"].to_list() == ["1996", None]
    assert frame["zip"].to_list() == ["55105", "00000"]
    config_of(raw, frame)


def test_movielens_20m(tmp_path):
    folder = write(
        tmp_path / "ml-20m",
        {
            "ratings.csv": "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,4.0,1112484676\n",
            "movies.csv": 'movieId,title,genres\n2,"American President, The (1995)",Comedy|Drama\n'
            "29,Babylon 5,(no genres listed)\n",
        },
    )
    (log,), raw = prepare("movielens-20m", folder, tmp_path / "out")
    frame = pl.read_parquet(log)
    assert frame["label"].to_list() == [0, 1]
    assert frame["genres"].to_list() == ["Comedy|Drama", None]
    assert frame["year"].to_list() == ["1995", None]
    config_of(raw, frame)


CRITEO_ROW = "\t".join(["1", *(str(n) for n in range(13)), *(f"{n:08x}" for n in range(26))]) + "\n"


@pytest.mark.parametrize("name", ["train.txt", "train.tsv.gz"])
def test_criteo_is_read_where_it_lies(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(gzip.compress(CRITEO_ROW.encode()) if name.endswith(".gz") else CRITEO_ROW.encode())
    for path in (file, tmp_path):
        (found,), raw = prepare("criteo-kaggle", path, tmp_path / "out")
        assert found == file.resolve()
    config = config_of(raw)
    offsets = {f.name: f.offset for f in config.log_schema.features if f.kind == "numeric"}
    assert offsets == {f"I{n}": 4.0 if n == 2 else 1.0 for n in range(1, 14)}
    assert sum(f.kind == "categorical" for f in config.log_schema.features) == 26
    assert len(config.data.column_names) == 40
    assert config.data.split.kind == "order"
    assert not (tmp_path / "out").exists()


def test_criteo_refuses_another_format(tmp_path):
    (tmp_path / "train.txt").write_text("1,2,3\n")
    with pytest.raises(UserError, match=r"train\.txt: row 1 has 1 tab-separated columns"):
        prepare("criteo-kaggle", tmp_path / "train.txt", tmp_path / "out")
    with pytest.raises(UserError, match="holds no train"):
        prepare("criteo-kaggle", write(tmp_path / "empty", {}), tmp_path / "out")


def test_criteo_days_are_put_in_order(tmp_path):
    for day in (10, 2, 0):
        (tmp_path / f"day_{day}.gz").write_bytes(gzip.compress(CRITEO_ROW.encode()))
    files, raw = prepare("criteo-1tb", tmp_path, tmp_path / "out")
    assert [file.name for file in files] == ["day_0.gz", "day_2.gz", "day_10.gz"]
    assert config_of(raw).data.train == tuple(str(file) for file in files)


def test_avazu(tmp_path):
    names = (
        "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,"
        "device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
    )
    row = "1000009418151094273,{},{},1005,0,1f,f3,28,ec,78,07,a9,dd,44,1,2,15706,320,50,1722,0,35,-1,79"
    content = "\n".join([names, row.format(0, "14102100"), row.format(1, "14103023")]) + "\n"
    (tmp_path / "train.gz").write_bytes(gzip.compress(content.encode()))
    (log,), raw = prepare("avazu", tmp_path / "train.gz", tmp_path / "out")
    frame = pl.read_parquet(log)
    assert frame["click"].to_list() == [0, 1]
    assert frame["hour_of_day"].to_list() == ["0", "23"]
    assert frame["weekday"].to_list() == ["2", "4"]  # 21 and 30 October 2014: Tuesday and Thursday
    assert frame["time"].to_list() == [1413849600, 1414710000]
    config = config_of(raw, frame)
    assert len(config.log_schema.features) == 23
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no column click, hour"):
        prepare("avazu", tmp_path / "train.csv", tmp_path / "out")


def test_frappe_draws_negatives_that_the_user_never_launched(tmp_path):
    names = [
        "user",
        "item",
        "cnt",
        "daytime",
        "weekday",
        "isweekend",
        "homework",
        "cost",
        "weather",
        "country",
        "city",
    ]
    launches = [(0, 10), (0, 11), (1, 10), (1, 12), (1, 13), (2, 14)]
    rows = [
        [str(u), str(i), "1", "morning", "monday", "weekday", "unknown", "free", "sunny", "USA", "0"]
        for u, i in launches
    ]
    folder = write(tmp_path / "f", {"frappe.csv": "\n".join("\t".join(row) for row in [names, *rows]) + "\n"})
    (log,), raw = prepare("frappe", folder / "frappe.csv", tmp_path / "out")
    frame = pl.read_parquet(log)
    assert frame["label"].to_list() == [1, 0, 0] * 6
    used = {(str(u), str(i)) for u, i in launches}
    for row in frame.iter_rows(named=True):
        assert ((row["user"], row["item"]) in used) == bool(row["label"])
    again, _ = prepare("frappe", folder, tmp_path / "again")
    assert pl.read_parquet(again[0]).equals(frame)
    config_of(raw, frame)


def kuairand_files() -> dict[str, str]:
    log = (
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,"
        "long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
    )
    onehot = ",".join(f"onehot_feat{n}" for n in range(18))
    users = (
        "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
        "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,"
        f"register_days,register_days_range,{onehot}\n"
    )
    user = '3,full_active,0,0,1,5,"(0,10]",0,0,0,0,107,61-90,' + ",".join(["1"] * 18) + "\n"
    videos = (
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
        "server_height,music_id,music_type,tag\n"
    )
    return {
        "log_standard_4_22_to_5_08_pure.csv": log
        + "3,8,20220425,0900,1650848400000,0,0,0,0,0,0,0,100,9000,0,0,0,0,4\n",
        "log_standard_4_08_to_4_21_pure.csv": log
        + "3,7,20220408,1600,1649408076860,1,0,0,0,0,0,1,175045,87433,0,0,0,0,1\n",
        "log_random_4_22_to_5_08_pure.csv": log,
        "user_features_pure.csv": users + user,
        "video_features_basic_pure.csv": videos
        + "7,33,NORMAL,2022-04-01,Web,0,87433,720,1280,77,4,39\n"
        + '8,34,AD,2022-04-02,Kmovie,0,9000,720,1280,78,9,"12,65"\n',
    }


@pytest.mark.parametrize("packed", [False, True])
def test_kuairand(tmp_path, packed):
    if packed:
        path = tmp_path / "KuaiRand-Pure.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, content in kuairand_files().items():
                entry = tarfile.TarInfo(f"KuaiRand-Pure/data/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content.encode()))
    else:
        path = tmp_path / "KuaiRand-Pure"
        write(path / "data", kuairand_files())
    (log,), raw = prepare("kuairand", path, tmp_path / "out")
    frame = pl.read_parquet(log)
    assert frame["video_id"].to_list() == ["7", "8"]
    assert frame["is_click"].to_list() == [1, 0]
    assert frame["hour"].to_list() == ["16", "9"]
    assert frame["tag"].to_list() == ["39", "12,65"]
    assert frame["follow_user_num_range"].to_list() == ["(0,10]"] * 2
    config = config_of(raw, frame)
    used = {feature.log_column for feature in config.log_schema.features}
    assert used.isdisjoint({"play_time_ms", "is_follow", "profile_stay_time"})
    assert config.log_schema.tasks == ("is_click", "long_view", "is_like")


def test_an_archive_writes_nothing_outside_its_scratch_folder(tmp_path):
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../users.dat", USERS_1M)
        archive.writestr("/movies.dat", MOVIES_1M.encode("latin-1"))
        archive.writestr("ratings.dat", RATINGS_1M)
    prepare("movielens-1m", path, tmp_path / "a" / "b" / "out")
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.dat")}
    assert found == {f"a/b/out/raw/{name}.dat" for name in ("users", "movies", "ratings")}


def test_broken_files_are_named(tmp_path):
    broken = tmp_path / "ml-1m.zip"
    broken.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=r"ml-1m\.zip: not a readable archive"):
        prepare("movielens-1m", broken, tmp_path / "out")
    folder = write(tmp_path / "ml", {"users.dat": USERS_1M, "movies.dat": MOVIES_1M}, "latin-1")
    with pytest.raises(UserError, match=r"holds no ratings\.dat"):
        prepare("movielens-1m", folder, tmp_path / "out")
    (folder / "ratings.dat").write_text("1::1::five::978300019\n")
    with pytest.raises(UserError, match=r"ratings\.dat: not the publisher's format"):
        prepare("movielens-1m", folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.part"))


def test_pinads_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("mldcn.datasets.registry.PINADS_SIZE", 200)
    (log,), raw = prepare("pinads", fetch("pinads", tmp_path), tmp_path / "out")
    frame = pl.read_parquet(log)
    assert frame.height == 200
    config_of(raw, frame)


def test_the_real_movielens_1m(tmp_path):
    (log,), raw = prepare("movielens-1m", real("ml-1m"), tmp_path)
    frame = pl.read_parquet(log)
    config_of(raw, frame)
    assert frame.height == 1_000_209
    assert frame["label"].mean() == pytest.approx(0.57516, abs=1e-5)
    assert frame["user_id"].n_unique() == 6040
    for name in ("gender", "age", "occupation", "zip", "genres", "year"):
        assert frame[name].null_count() == 0


def test_the_real_criteo_sample(tmp_path):
    (file,), raw = prepare("criteo-kaggle", real("criteo-60k"), tmp_path)
    assert file.name == "train.tsv.gz"
    features = config_of(raw).log_schema.features
    assert [f.encoding.min_count for f in features if f.kind == "categorical"] == [2] * 26
