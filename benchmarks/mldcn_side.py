"""mldcn's side of the benchmarks, and the ceilings beside it. See encode.py and dcnv2.py."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from logs import config
from turns import Answers, Result, serve

Options = argparse.Namespace


def encode(options: Options) -> Callable[[], Result]:
    """Fit, encode, write."""
    from mldcn.data.prepare import prepare

    def work() -> Result:
        shutil.rmtree(options.folder, ignore_errors=True)
        start = time.perf_counter()
        encoded = prepare(config(options.log, all_ids=False), options.folder)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "ids": sum(encoded.encoder.layout.tables.values())}

    return work


def parse(options: Options) -> Callable[[], Result]:
    """Polars only parsing the log, every column as text."""
    import polars as pl

    def work() -> Result:
        start = time.perf_counter()
        pl.read_csv(options.log, infer_schema=False)
        return {"seconds": time.perf_counter() - start}

    return work


def prepared(options: Options) -> tuple[Any, Any, Any]:
    """Config, encoded rows and an empty run's folder."""
    from mldcn.data.prepare import prepare
    from mldcn.run import RunFolder

    settings = config(options.log, all_ids=True, threads=options.threads, batch=options.batch)
    data = prepare(settings, options.folder)
    run = Path(tempfile.mkdtemp(dir=options.folder.parent)) / "run"
    return settings, data, RunFolder.create(run)


def train(options: Options) -> None:
    """``fit`` as it is; an observer holds it while it is not its turn. A turn lasts from report to report."""
    from mldcn.training.fit import fit
    from mldcn.training.observers import Observer, Progress

    settings, data, run = prepared(options)

    class Turns(Observer):
        answers: Answers | None = None
        since = (0, 0.0)
        held = 0.0
        over = False

        def stepped(self, progress: Progress) -> None:
            now = time.perf_counter()
            if self.over:
                return
            if self.answers is None:  # the first steps warm up
                self.answers = Answers(options.about)
            else:
                rows = (progress.step - self.since[0]) * options.batch
                self.answers.send({"rate": rows / (now - self.since[1])})
            self.over = not self.answers.asked()
            self.since = (progress.step, time.perf_counter())
            self.held += self.since[1] - now

    options.about |= model(settings, data).parameter_counts()
    turns = Turns()
    summary = fit(settings, run, data, observers=[turns])
    assert turns.answers is not None
    waited = summary.data_wait_share * summary.seconds
    turns.answers.send({"waited": waited / (summary.seconds - turns.held)})


def model(settings: Any, data: Any) -> Any:
    """The model alone."""
    import torch

    from mldcn.model import Ranker

    torch.set_num_threads(settings.training.threads)
    return Ranker(settings.model, settings.log_schema, data.encoder.layout)


def predict(options: Options) -> Callable[[], Result]:
    """Every encoded row from disk to its probability, as ``mldcn evaluate`` does it."""
    import torch

    from mldcn.training.evaluate import score

    settings, data, _ = prepared(options)
    ranker = model(settings, data).eval()

    def work() -> Result:
        rows, start = 0, time.perf_counter()
        with torch.no_grad():
            batches = score(ranker, data.train, settings.training.eval_batch_size, torch.device("cpu"))
            for _, labels, *_ in batches:
                rows += len(labels)
        return {"rate": rows / (time.perf_counter() - start)}

    return work


def predict_raw(options: Options) -> Callable[[], Result]:
    """The raw log to a file of probabilities, as ``mldcn predict`` does it."""
    from mldcn.predict import Predictor, predict_file
    from mldcn.training.fit import fit

    settings, data, run = prepared(options)
    fit(settings, run, data)
    predictor = Predictor.load(run.path)
    out = options.folder.parent / "scores.parquet"

    def work() -> Result:
        start = time.perf_counter()
        scored = predict_file(predictor, [options.log], out)
        return {"rate": scored.rows / (time.perf_counter() - start)}

    return work


def products(options: Options) -> Callable[[], Result]:
    """Nothing but the model's matrix products, at the batch's height and at a quarter of it: the faster."""
    import torch

    widths = [(624, 624)] * 3 + [(624, 400), (400, 400), (1024, 1)]
    torch.set_num_threads(options.threads)
    forward_only = options.work == "products-forward"

    def seconds(height: int) -> float:
        elapsed = 0.0
        for i, o in widths:
            x, weight, grad = torch.randn(height, i), torch.randn(o, i), torch.randn(height, o)
            out, x_grad, weight_grad = torch.empty(height, o), torch.empty(height, i), torch.empty(o, i)
            for timed in (False, True):
                start = time.perf_counter()
                for _ in range(options.batch // height):
                    torch.mm(x, weight.t(), out=out)
                    if not forward_only:
                        torch.mm(grad, weight, out=x_grad)
                        torch.mm(grad.t(), x, out=weight_grad)
                elapsed += timed * (time.perf_counter() - start)
        return elapsed

    flops = (1 if forward_only else 3) * options.batch * sum(2 * i * o for i, o in widths)

    def work() -> Result:
        heights = (options.batch, options.batch // 4)
        best = min(statistics.mean(seconds(height) for _ in range(3)) for height in heights)
        return {"rate": options.batch / best, "gflops": flops / best / 1e9}

    return work


def profile(options: Options) -> Callable[[], Result]:
    """Where the time of training steps goes: each operator's own share, once everything is warm."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    from mldcn.training.fit import fit
    from mldcn.training.observers import Observer, Progress

    settings, data, run = prepared(options)
    recorder = recorded(activities=[ProfilerActivity.CPU])

    class Recording(Observer):
        def stepped(self, progress: Progress) -> None:
            if progress.step == options.steps:
                recorder.start()
            elif progress.step == 2 * options.steps:
                recorder.stop()

    def work() -> Result:
        fit(settings, run, data, observers=[Recording()])
        times = {item.key: item.self_cpu_time_total for item in recorder.key_averages()}
        total = sum(times.values())
        shares = {
            kind: sum(times.get(f"aten::{name}", 0.0) for name in names) / total
            for kind, names in KINDS.items()
        }
        return {"shares": shares | {"everything else": 1 - sum(shares.values())}}

    return work


KINDS = {
    "matrix products": ("mm", "addmm"),
    "multiplying, adding, summing": ("mul", "mul_", "add", "add_", "sum", "addcmul", "addcmul_"),
    "copying, joining": ("copy_", "cat", "fill_"),
    "look-up, sorting, rows of tables": (
        "index_select", "index_copy_", "sort", "_embedding_bag_forward_only", "embedding", "nonzero", "ne",
    ),
    "optimisers and norms": ("_fused_adam_", "lerp_", "addcdiv_", "sqrt_", "div", "linalg_vector_norm"),
    "activations and loss": ("threshold_backward", "clamp_min", "log_sigmoid_forward", "sigmoid"),
}  # fmt: skip

WORK: dict[str, Callable[[Options], Callable[[], Result]]] = {
    "encode": encode,
    "parse": parse,
    "predict": predict,
    "predict-raw": predict_raw,
    "products": products,
    "products-forward": products,
    "profile": profile,
}


def main() -> None:
    """Serves one kind of work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=["train", *WORK])
    parser.add_argument("--log", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.about = {name: version(name) for name in ("mldcn", "torch", "polars", "pyarrow")}
    if options.work == "train":
        train(options)
    else:
        work = WORK[options.work](options)
        serve(options.about, work)


if __name__ == "__main__":
    main()
