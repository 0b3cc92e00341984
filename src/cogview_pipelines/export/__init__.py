"""
Models for programs without PyTorch: `onnx_folder.py` writes what onnxruntime runs, `onnx_pictures.py` draws with it.
"""
