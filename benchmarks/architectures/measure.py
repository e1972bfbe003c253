"""One type, in a process of its own that may take so long and no longer."""

from __future__ import annotations

import logging
import multiprocessing
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from benchmarks.architectures.dropout import dropout_row
from benchmarks.architectures.fisher import fisher_row
from benchmarks.architectures.models import build
from benchmarks.architectures.words import line


def measured(kind: str, model_type: str, *, limit: float) -> dict[str, Any]:
    """The row of a type; what is missing in it was not reached within `limit` seconds, or took its process along."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, kind, model_type), daemon=True)
    row: dict[str, Any] = {"kind": kind, "type": model_type}
    began = time.perf_counter()
    process.start()
    theirs.close()
    try:
        row |= _received(ours, began + limit, limit)
    finally:
        process.kill()
        process.join()
        ours.close()
    return {**row, "seconds": round(time.perf_counter() - began, 2)}


def _received(ours: Connection, end: float, limit: float) -> dict[str, Any]:
    row: dict[str, Any] = {}
    while True:
        try:
            part = ours.recv() if ours.poll(max(0.0, end - time.perf_counter())) else {"message": f"{limit:g} s"}
        except EOFError:
            part = {"message": "its process died"}
        if part is None:
            return row
        if "message" not in part:
            row |= part
            continue
        place = next((name for name in ("fisher", "dropout") if name not in row), "dropout")
        if "class" not in row:
            return {"not_built": part["message"]}
        return {**row, place: {"status": "failed", **part}}


def _send(connection: Connection, kind: str, model_type: str) -> None:
    """Send a type's row in the order in which its parts come about, and None."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        model = build(kind, model_type)
    except Exception as e:
        connection.send({"not_built": line(e)})
    else:
        connection.send({"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())})
        for name, part in (("fisher", fisher_row), ("dropout", dropout_row)):
            try:
                found = part(kind, model_type)
            except Exception as e:
                found = {"status": "failed", "message": line(e)}
            connection.send({name: found})
    connection.send(None)
