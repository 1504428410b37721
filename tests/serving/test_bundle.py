"""Bundles: whole or not there, refused when damaged, of another version or hostile."""

import json
import shutil

import numpy as np
import pytest

from every_feature import columns, log
from mldcn.data.reading import digest
from mldcn.errors import UserError
from mldcn.predict import Predictor
from mldcn.serving.bundle import new_bundle
from mldcn.serving.engine import Engine
from mldcn.serving.portable import _is_allowed, _is_size


@pytest.fixture
def copied(small_bundle, tmp_path):
    return shutil.copytree(small_bundle, tmp_path / "copy")


def edit(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def resealed(bundle):
    """With a manifest that vouches for what lies there now, as whoever may write the folder can make one."""

    def change(manifest):
        manifest["files"] = {
            str(file.relative_to(bundle)): {"bytes": file.stat().st_size, "sha256": digest(file)}
            for file in bundle.rglob("*")
            if file.is_file() and file.name != "manifest.json"
        }

    edit(bundle / "manifest.json", change)
    return bundle


def test_a_bundle_answers_as_its_run_and_needs_nothing_else(small_run, copied):
    engine = Engine.load(copied, "cpu")
    rows = log(100, seed=1, unseen=True)
    expected = Predictor.load(small_run.path, "cpu").predict_table(rows)
    names = [each.name for each in engine.inputs]
    np.testing.assert_allclose(engine.score(columns(rows, names)).probabilities, expected, atol=1e-6)
    assert engine.name == "small"
    assert engine.version != Engine.load(small_run.path, "cpu").version
    request = engine.sample()
    assert len(engine.rank(request["constant"], request["candidates"])) == 4


def test_every_damaged_or_missing_file_is_named(small_bundle, tmp_path):
    names = [str(file.relative_to(small_bundle)) for file in small_bundle.rglob("*") if file.is_file()]
    assert {"bundle.json", "program.json", "program.safetensors", "tables/table-000.bin"} < set(names)
    assert not [name for name in names if name.endswith((".pkl", ".pt", ".pt2", ".bin.tmp"))]
    for number, name in enumerate(names):
        bundle = shutil.copytree(small_bundle, tmp_path / str(number))
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{number}/" + ("" if name == "manifest.json" else name)):
            Engine.load(bundle, "cpu")
        (bundle / name).unlink()
        with pytest.raises(UserError, match=f"{number}.*(missing|cannot be read|is neither)"):
            Engine.load(bundle, "cpu")


def test_files_that_the_manifest_does_not_know_are_refused(copied):
    (copied / "more.txt").write_text("more")
    with pytest.raises(UserError, match="more.txt: is no part of the bundle"):
        Engine.load(copied, "cpu")
    (copied / "more.txt").unlink()
    outside = {"../outside": {"bytes": 0, "sha256": ""}}
    edit(copied / "manifest.json", lambda raw: raw["files"].update(outside))
    with pytest.raises(UserError, match="names '../outside', which lies outside"):
        Engine.load(copied, "cpu")


def test_another_version_is_refused(copied):
    edit(copied / "manifest.json", lambda raw: raw.update(format=99))
    with pytest.raises(UserError, match="a bundle of format 99; this version of mldcn .* reads format 2"):
        Engine.load(copied, "cpu")


def test_another_answer_than_at_export_is_refused(copied):
    edit(copied / "sample.json", lambda raw: raw["probabilities"][0].__setitem__(0, 0.123))
    with pytest.raises(UserError, match="answered otherwise than at export"):
        Engine.load(resealed(copied), "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda node: node.update(target="torch.os.system"), "asks for the operation 'torch.os.system'"),
        (lambda node: node.update(target="torch.ops.aten.from_file.default"), "asks for the operation"),
        (lambda node: node.update(metadata={"stack_trace": "x"}), "holds notes on its operations"),
        (
            lambda node: node["inputs"].append({"expr_str": "__import__('os').system('true')"}),
            "holds the expression",
        ),
    ],
)
def test_a_hostile_program_is_refused_before_pytorch_reads_it(copied, change, message):
    edit(copied / "program.json", lambda raw: change(raw["graph_module"]["graph"]["nodes"][0]))
    with pytest.raises(UserError, match=message):
        Engine.load(resealed(copied), "cpu")


def test_guards_are_refused(copied):
    edit(copied / "program.json", lambda raw: raw.update(guards_code=["print()"]))
    with pytest.raises(UserError, match="is no program of an export"):
        Engine.load(resealed(copied), "cpu")


def test_only_operations_on_tensors_are_let_through():
    assert _is_allowed("torch.ops.aten.addmm.default")
    assert _is_allowed("torch.ops.aten.mT.default")
    assert _is_allowed("_operator.getitem")
    for name in ("from_file.default", "save.default", "_print.default", "__init__.x", "set_.source_Tensor"):
        assert not _is_allowed(f"torch.ops.aten.{name}")
    for name in (
        "torch.load",
        "torch.ops.aten.addmm",
        "torch.ops.load_library",
        "_operator.attrgetter",
        "math.exp",
    ):
        assert not _is_allowed(name)
    assert not _is_allowed("torch.ops.aten.add.Tensor.__class__")


def test_only_sizes_are_evaluated():
    batch = "Symbol('s23', positive=True, integer=True)"
    for size in (
        "7",
        "-7",
        "Integer(-7)",
        batch,
        f"Mul(Integer(6), {batch})",
        f"Add(Integer(-1), Mul(2, {batch}))",
    ):
        assert _is_size(size)
    for other in (
        "__import__('os')",
        "Symbol('x.y')",
        "Pow(9, 9)",
        "Integer.mro()",
        "Symbol('s1', f())",
        "(",
        "a",
    ):
        assert not _is_size(other)
    assert not _is_size("(" * 10_000)


def test_a_bundle_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "bundle"
    with pytest.raises(RuntimeError), new_bundle(path, overwrite=False) as folder:
        (folder / "bundle.json").write_text("{}")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for content in ("1", "2"):
        with new_bundle(path, overwrite=True) as folder:
            (folder / "bundle.json").write_text(content)
        assert (path / "bundle.json").read_text() == content
    with pytest.raises(UserError, match="holds a bundle already"), new_bundle(path, overwrite=False):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letters").write_text("")
    with (
        pytest.raises(UserError, match="is no bundle, so it is not replaced"),
        new_bundle(tmp_path / "other", overwrite=True),
    ):
        pass
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bundle", "other"]
