"""Results that ship: artefact folder, hub, native checkpoints, ONNX and torch.export, measured speed-up."""
