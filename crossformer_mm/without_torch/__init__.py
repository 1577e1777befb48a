"""Code that also runs where PyTorch is not installed: exported models, image files and results.

Nothing here imports the rest of the package, PyTorch or an OpenMMLab package. tools/run_onnx.py and
programs on a server use this folder by itself, without ``crossformer_mm`` around it.
"""
