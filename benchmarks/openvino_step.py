"""``python openvino_step.py SIDE BATCH``: seconds a step of the published network in OpenVINO."""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import openvino
import torch
from bench_sampling import plain_network

from palette import ops


def main(side: int, batch: int) -> None:
    network = plain_network()
    inputs = torch.rand(batch, 6, side, side), torch.full((batch,), 0.5)
    with torch.no_grad(), ops.use("reference"):
        wanted = network(*inputs)
        model = openvino.convert_model(
            network, example_input=inputs, input=[tuple(each.shape) for each in inputs]
        )
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}
    request = openvino.compile_model(model, "CPU", hints).create_infer_request()
    arrays = [each.numpy() for each in inputs]
    found = next(iter(request.infer(arrays).values()))
    error = np.linalg.norm(found - wanted.numpy()) / np.linalg.norm(wanted.numpy())
    assert error < 0.1, f"OpenVINO is {error:.3g} from PyTorch: not worth a time"
    times = []
    for _ in range(15):
        start = time.perf_counter()
        request.infer(arrays)
        times.append(time.perf_counter() - start)
    print(statistics.median(times))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
