"""Triton kernels for what a transformer does between its products: each value is read once and written once.

They need `triton`, which comes with PyTorch for CUDA; nothing here is imported before it is asked for. Each is an operator with
a gradient, which Dynamo, Inductor and activation checkpoints take as it is; none has a forward-mode derivative.
"""
