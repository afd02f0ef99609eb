"""Models as ONNX files that are proven equal, and ONNX files as models."""
