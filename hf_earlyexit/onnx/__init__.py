"""Export to ONNX: one file that stops at the exit, or a file for each layer; needs the extra `onnx`."""
