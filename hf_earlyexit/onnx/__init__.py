"""Export to ONNX: one file that stops at the exit, or a file for each layer; needs the extra `onnx`."""

ONE, LAYERS = FORMS = ("one-file", "layers")  # what is written
FOLDER, TRITON = LAYOUTS = ("folder", "triton")  # for whom
ONNX_STATIC = "onnx-int8-static"  # how answers by fixed scales name their form
