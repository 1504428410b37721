"""FuxiCTR's side of the benchmarks; runs in ``.venv-peers``, without mldcn. See encode.py and dcnv2.py."""

from __future__ import annotations

import argparse
import itertools
import logging
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fuxictr.features import FeatureMap
from fuxictr.preprocess import FeatureProcessor, build_dataset
from fuxictr.preprocess.build_dataset import init_ray
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import CrossNetV2, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import nn
from turns import serve

NUMBERS = [f"I{i}" for i in range(1, 14)]
IDS = [f"C{i}" for i in range(1, 27)]
NAME = "log"


def processor(folder: Path, all_ids: bool) -> FeatureProcessor:
    """Columns as the Criteo configs of its model zoo have them: numbers scaled, ids with a vocabulary."""
    numbers = {
        "name": NUMBERS,
        "active": True,
        "dtype": "float",
        "type": "numeric",
        "normalizer": "MinMaxScaler",
    }
    ids = {"name": IDS, "active": True, "dtype": "str", "type": "categorical", "fill_na": ""}
    columns = [ids | {"name": NUMBERS + IDS}] if all_ids else [numbers, ids]
    label = {"name": "label", "dtype": "float"}
    return FeatureProcessor(feature_cols=columns, label_col=label, dataset_id=NAME, data_root=str(folder))


def encode(log: Path, folder: Path, all_ids: bool) -> float:
    """Seconds of its whole preprocessing: fit, transform, write."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    build_dataset(processor(folder, all_ids), train_data=str(log))
    return time.perf_counter() - start


class DCNv2(BaseModel):
    """DCN-V2, parallel: its own blocks put together as its model zoo does, for features without sequences."""

    def __init__(self, feature_map: FeatureMap, folder: Path) -> None:
        super().__init__(feature_map, model_root=str(folder), verbose=0, metrics=["AUC"])
        self.embedding_layer = FeatureEmbedding(feature_map, 16)
        width = feature_map.sum_emb_out_dim()
        self.crossnet = CrossNetV2(width, 3)
        self.parallel_dnn = MLP_Block(width, hidden_units=[400, 400], hidden_activations="ReLU")
        self.fc = nn.Linear(width + 400, 1)
        self.compile("adam", "binary_cross_entropy", 1e-3)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Probabilities."""
        x0 = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        out = torch.cat([self.crossnet(x0), self.parallel_dnn(x0)], dim=-1)
        return {"y_pred": self.output_activation(self.fc(out))}


def loader(feature_map: FeatureMap, folder: Path, kind: str, batch: int, train: bool) -> Any:
    """Its loader of encoded rows: npz holds them in memory, parquet streams them through Ray."""
    path = folder / NAME / "train.parquet"
    if kind == "npz":
        table = pd.read_parquet(path)
        path = path.with_suffix(".npz")
        if not path.exists():
            np.savez(path, **{name: table[name].to_numpy() for name in table})
    stage = (
        {"stage": "train", "train_data": str(path)} if train else {"stage": "test", "test_data": str(path)}
    )
    found = RankDataLoader(
        feature_map, batch_size=batch, shuffle=train, data_format=kind, num_workers=1, **stage
    )
    return found[0] if train else found


def endless(batches: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(batches))


def main() -> None:
    """Serves one kind of work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=["encode", "encode-ids", "train", "predict"])
    parser.add_argument("--log", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--loader", choices=["npz", "parquet"], default="npz")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about: dict[str, Any] = {name: version(name) for name in ("fuxictr", "torch", "polars", "ray")}
    if options.work.startswith("encode"):
        init_ray()
        all_ids = options.work == "encode-ids"
        serve(about, lambda: {"seconds": encode(options.log, options.folder, all_ids)})
        return
    feature_map = FeatureMap(NAME, str(options.folder / NAME))
    feature_map.load(str(options.folder / NAME / "feature_map.json"), {"embedding_dim": 16})
    model = DCNv2(feature_map, options.folder)
    model._max_gradient_norm = 10.0
    tables = sum(p.numel() for p in model.embedding_layer.parameters())
    everything = sum(p.numel() for p in model.parameters())
    about |= {"dense": everything - tables, "embedding": tables, "loader": options.loader}
    if options.work == "train":
        batches = endless(loader(feature_map, options.folder, options.loader, options.batch, True))
        model.train()

        def train() -> dict[str, Any]:
            waited, start = 0.0, time.perf_counter()
            rows = 0
            for _ in range(options.steps):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                model.train_step(batch).item()  # its train_epoch reads the loss at every step
                rows += len(batch["label"])
            seconds = time.perf_counter() - start
            return {"rate": rows / seconds, "waited": waited / seconds}

        serve(about, train)
    else:
        batches = loader(feature_map, options.folder, options.loader, options.batch, False)

        def predict() -> dict[str, Any]:
            start = time.perf_counter()
            scored = model.predict(batches)
            return {"rate": len(scored) / (time.perf_counter() - start)}

        serve(about, predict)


if __name__ == "__main__":
    main()
