"""Triton kernels of the functional layer; nothing here is imported before it is asked for."""
