"""A plain FastAPI server of a run's model in PyTorch, for the body of ``/v1/rank``; see ``serving.py``.

It encodes raw values with mldcn's own preprocessing and scores each request by itself, in FastAPI's pool of
threads.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import Body, FastAPI

from mldcn.predict import Predictor
from mldcn.serving.engine import Engine


def app() -> FastAPI:
    """One worker's application."""
    torch.set_num_threads(int(os.environ["SIDE_THREADS"]))
    engine = Engine.of_predictor(Predictor.load(Path(os.environ["SIDE_FOLDER"]), "cpu"))
    served = FastAPI()

    @served.post("/v1/rank")
    def rank(request: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008
        scores = engine.rank(request["user"] | request["context"], request["candidates"]).probabilities[:, 0]
        order = np.argsort(-scores, kind="stable")
        return {"ranking": order.tolist(), "scores": scores[order].tolist()}

    return served


def main() -> None:
    """Serves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ |= {"SIDE_THREADS": str(options.threads), "SIDE_FOLDER": str(options.folder)}
    here = str(Path(__file__).parent)
    uvicorn.run(
        "fastapi_side:app",
        factory=True,
        app_dir=here,
        host="127.0.0.1",
        port=options.port,
        workers=options.workers,
        timeout_worker_healthcheck=120,  # PyTorch takes long to import
        log_level="error",
    )


if __name__ == "__main__":
    main()
