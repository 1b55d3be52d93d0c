"""Run with stock Petals: reads swarms as JSON, writes what the package decides for the first server of each."""

from __future__ import annotations

import json
import logging
import sys

import numpy as np
from petals import data_structures as ds
from petals.server import block_selection as bs


def module_infos(swarm):
    infos = [ds.RemoteModuleInfo(uid=f"m.{block}", servers={}) for block in range(int(swarm["blocks"][0]))]
    for row, (start, end, rate) in enumerate(zip(swarm["start"], swarm["end"], swarm["rate"], strict=True)):
        for block in range(start, end):
            infos[block].servers[row] = ds.ServerInfo(state=ds.ServerState.ONLINE, throughput=rate)
    return infos


def decide(swarm):
    infos = module_infos(swarm)
    moves = []
    for seed in range(4):
        np.random.seed(seed)
        moves.append(bool(bs.should_choose_other_blocks(0, infos, 0.75)))
    best = bs.choose_best_blocks(swarm["end"][0] - swarm["start"][0], infos)[0]
    return {"best": int(best), "moves": sorted(set(moves))}


logging.disable(logging.CRITICAL)
sys.stdout.write(json.dumps([decide(swarm) for swarm in json.load(sys.stdin)]) + "\n")
