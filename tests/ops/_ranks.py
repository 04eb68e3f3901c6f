"""Ranks of a test with torchrun's environment, forked from a process that has imported everything."""

import multiprocessing
import os
import socket

import torch


def start(world, function, *args):
    """Processes that call ``function(rank, world, *args)`` of an importable module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ercn.training.fit", "ercn.training.pretraining", "timm"])
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    ranks = [context.Process(target=_run, args=(rank, world, port, function, args)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def run(world, function, *args, timeout=120):
    """Exit codes of the ranks, which are killed after ``timeout`` seconds."""
    ranks = start(world, function, *args)
    for rank in ranks:
        rank.join(timeout)
        rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks]


def _run(rank, world, port, function, args):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    function(rank, world, *args)
