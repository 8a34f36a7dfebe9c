"""A detector as a program of fixed shapes: torch.export and ONNX."""
