"""A trained network as files for other programs: ONNX, torch.export's pt2, safetensors, and each compared with torch.

``python -m datafree.export`` is the command; :func:`datafree.exporting.files.export_network` is what it calls.
"""
