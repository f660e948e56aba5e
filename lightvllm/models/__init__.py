"""Models: architectures by name, their weights from safetensors, and ``LightvLLM`` for a bare model.

May import layers and kernels; knows nothing of sequences, schedulers or workers.
"""
