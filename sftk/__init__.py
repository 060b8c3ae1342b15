"""Self-forcing toolkit: causal, few-step, streaming video diffusion students as graphs of pure functions."""
