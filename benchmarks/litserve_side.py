"""LitServe as one would write it for the body of ``/v1/rank``; see ``serving.py``.

It encodes raw values with mldcn's own ``Engine.encode_rank``, the cheapest preprocessing that is right, and
computes the bundle's ONNX file in ONNX Runtime. With ``--batch`` LitServe puts requests together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import onnxruntime
import torch

from mldcn.serving.engine import Engine


class Ranking(litserve.LitAPI):
    """The bundle's ONNX file."""

    folder: Path
    threads: int

    def setup(self, device: str) -> None:
        """In a worker's process."""
        torch.set_num_threads(self.threads)
        self.engine = Engine.load(self.folder, "cpu")  # for its preprocessing
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self.threads
        self.session = onnxruntime.InferenceSession(str(self.folder / "model.onnx"), settings)

    def decode_request(self, request, **_):  # LitServe reads annotations: it takes any JSON without
        """Raw values to tensors."""
        rows = self.engine.encode_rank(request["user"] | request["context"], request["candidates"])
        return rows.ids, rows.dense

    def batch(self, inputs: list[Any]) -> Any:
        """Several requests' tensors as one."""
        self.sizes = [len(ids) for ids, _ in inputs]
        return np.concatenate([ids for ids, _ in inputs]), np.concatenate([dense for _, dense in inputs])

    def predict(self, x: Any, **_: Any) -> Any:
        """Probabilities."""
        return self.session.run(["probabilities"], {"ids": x[0], "dense": x[1]})[0]

    def unbatch(self, output: Any) -> list[Any]:
        """Each request's own."""
        return np.split(output, np.cumsum(self.sizes)[:-1])

    def encode_response(self, output, **_):
        """The ranking by the first task, best first."""
        scores = output[:, 0]
        order = np.argsort(-scores, kind="stable")
        return {"ranking": order.tolist(), "scores": scores[order].tolist()}


def main() -> None:
    """Serves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    api = Ranking(max_batch_size=options.batch, batch_timeout=0.001, api_path="/v1/rank")
    api.folder, api.threads = options.folder, options.threads
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=options.workers, timeout=10)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="error")


if __name__ == "__main__":
    main()
