"""Predicts with LeRobot's policy, by orders, for bench/policy.py.

    .venv-lerobot/bin/python tests/bench/policy_lerobot.py SIZE ROWS

In a process of its own, since ours keeps freed memory once a policy is optimized
(act_lightning/memory.py), which is not LeRobot's doing. Its orders:

    {"bfloat16": true}                   predicts, under autocast or not; answers when it is done
    {"bfloat16": true, "show": true}     answers with the chunks, in physical units
"""

from __future__ import annotations

import argparse

import torch
from networks import LeRobot
from peers import Orders
from torch import Tensor
from train_steps import SIZES


def main() -> None:
    """Serves until no order comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("rows", type=int)
    arguments = parser.parse_args()
    orders, size = Orders(), SIZES[arguments.size]
    peer = LeRobot(size.build())
    samples = {
        name: value
        for name, value in LeRobot.samples(size.batch(arguments.rows), size.spec.cameras).items()
        if name.startswith("observation")
    }

    @torch.inference_mode()
    def predict(bfloat16: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            chunks: Tensor = peer.after(peer.policy.predict_action_chunk(peer.before(samples)))
        return chunks

    orders.answer({})
    while (order := orders.next()) is not None:
        chunks = predict(order["bfloat16"])
        orders.answer({"chunks": chunks.float().tolist()} if order.get("show") else {})


if __name__ == "__main__":
    main()
