"""Processes that start in no time: forked from a server that has imported everything. They may be killed, or be a world."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["conftest", "stepdistill.runs", "stepdistill.evaluate.evaluation", "diffusers.loaders.peft"]
)  # whose import takes seconds


def start(function: Callable[..., Any], *args: Any, **environment: str) -> BaseProcess:
    """Call a function of a test module in a process of its own, with these variables of the environment."""
    process = SERVER.Process(target=_call, args=(function, args, environment))
    process.start()
    return process


def world(n: int, function: Callable[..., Any], *args: Any, seconds: float = 60) -> list[Any]:
    """What a function returns in each of n processes that know of each other (gloo).

    Raises:
        AssertionError: it failed in one, whose traceback this shows, or they took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        inbox, everyone = SERVER.SimpleQueue(), []
        for rank in range(n):
            everyone.append(start(_join, (Path(folder) / "store", rank, n), inbox, function, args, **_names(rank, n)))
        for process in everyone:
            process.join(seconds)
        told = {}
        while not inbox.empty():
            rank, result = inbox.get()
            told[rank] = result
        for process in everyone:
            process.kill()
    for rank in range(n):
        assert rank in told, f"process {rank} of {n} ended with {everyone[rank].exitcode} and said nothing; told: {told}"
        assert not isinstance(told[rank], str) or not told[rank].startswith("Traceback"), f"process {rank}:\n{told[rank]}"
    return [told[rank] for rank in range(n)]


def endings(n: int, function: Callable[..., Any], *args: Any, seconds: float = 60) -> list[int | None]:
    """How n processes that know of each other ended, each with the status that a function returns; None: it had not yet."""
    with tempfile.TemporaryDirectory() as folder:
        everyone = [start(_meet, (Path(folder) / "store", rank, n), function, args, **_names(rank, n)) for rank in range(n)]
        until = time.monotonic() + seconds
        for process in everyone:
            process.join(max(0.0, until - time.monotonic()))
        found = [process.exitcode for process in everyone]
        for process in everyone:
            process.kill()
    return found


def _names(rank: int, n: int) -> dict[str, str]:
    """What a launcher tells a process of a machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}


def _call(function: Callable[..., Any], args: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    result = function(*args)
    sys.exit(result if isinstance(result, int) else 0)


def _join(meet: tuple[Path, int, int], inbox: Any, function: Callable[..., Any], args: tuple) -> None:
    rank = meet[1]
    try:
        inbox.put((rank, _meet(meet, function, args)))
    except BaseException:
        inbox.put((rank, traceback.format_exc()))
        raise


def _meet(meet: tuple[Path, int, int], function: Callable[..., Any], args: tuple) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    file, rank, n = meet
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # accelerate wants them; the processes meet in a file
    dist.init_process_group("gloo", store=dist.FileStore(str(file), n), rank=rank, world_size=n, timeout=timedelta(seconds=60))
    result = function(*args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result
