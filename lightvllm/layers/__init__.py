"""The building blocks of a model: split over tensor-parallel ranks, computing through ``lightvllm.kernels``.

Layers are plain objects holding plain tensors, so that a step spends no time in attribute look-up; each says by
``weights`` which checkpoint tensors (and which slice of them) belong into its memory. They know no checkpoint
format, no scheduler and no sequence. May be imported by models and worker.
"""
