"""Processes that were started together know of each other, with a GPU or without."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from stepdistill import distributed


@pytest.mark.parametrize("accelerator", [True, False])
def test_accelerate_is_told_where_there_is_no_accelerator(monkeypatch, accelerator):
    asked = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(distributed, "PartialState", lambda **how: asked.append(how))
    distributed.state()
    assert asked == [{"cpu": not accelerator}]


@pytest.mark.long
def test_two_processes_are_a_world():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = (
        "import torch\nfrom stepdistill import distributed as d\n"
        "print(d.rank(), d.world(), d.mean(torch.tensor(float(d.rank()))).item(), d.device().type)"
    )
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    assert [one.communicate(timeout=120)[0].split() for one in started] == [[rank, "2", "0.5", "cpu"] for rank in "01"]
