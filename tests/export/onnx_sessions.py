"""ONNX Runtime as any user of a file would run it."""

import torch


def open_session(data: bytes):
    import onnxruntime

    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def run(data: bytes, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    session = open_session(data)
    values = session.run(None, {k: v.numpy() for k, v in inputs.items()})
    return {o.name: torch.as_tensor(v) for o, v in zip(session.get_outputs(), values, strict=True)}
