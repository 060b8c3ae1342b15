"""What GPUs can do, for estimates: memory, rates of kernels, bandwidths. Every number with its source."""

from __future__ import annotations

import attrs

from sftk.errors import SpecError, did_you_mean

GIB = 2**30
NODE = 8
"""GPUs of a node, where nothing else is said."""


@attrs.frozen(kw_only=True)
class Gpu:
    """A GPU.

    Args:
        memory: GiB that a process may fill; the driver and CUDA's context are left out.
        gemm: TFLOP/s of bf16 matrix products.
        attention, attention_backward: TFLOP/s of bf16 attention through PyTorch (`sdpa`), which takes cuDNN's on these.
        flash, flash_backward: through FlashAttention (`flash`).
        bandwidth: TB/s of its memory.
        link: GB/s to the other GPUs of a node, each way.
        source: `measured`, or how the rates were scaled.
    """

    memory: float
    gemm: float
    attention: float
    attention_backward: float
    flash: float
    flash_backward: float
    bandwidth: float
    link: float
    source: str

    def matrix_seconds(self, gemm: float, attention: float, attention_backward: float, *, flash: bool) -> float:
        """Seconds of matrix products and attention in bf16, from operations of each.

        Args:
            flash: attention through FlashAttention, else through PyTorch.

        Example:
            >>> gpu("h100").matrix_seconds(680e12, 650e12, 0.0, flash=True)
            2.0
        """
        forward = self.flash if flash else self.attention
        backward = self.flash_backward if flash else self.attention_backward
        return (gemm / self.gemm + attention / forward + attention_backward / backward) / 1e12


NETWORK = 50.0
"""GB/s of a GPU to other nodes, each way: one 400 Gbit/s port for each GPU."""

GPUS: dict[str, Gpu] = {
    "h100": Gpu(
        memory=79.1, gemm=680, attention=560, attention_backward=530, flash=650, flash_backward=620, bandwidth=3.35,
        link=450, source="rates measured on one H100 SXM at the shapes of Wan 1.3B; bandwidths from its data sheet",
    ),
    "h200": Gpu(
        memory=139.8, gemm=680, attention=560, attention_backward=530, flash=650, flash_backward=620, bandwidth=4.8,
        link=450, source="as the H100, whose processor it has; bandwidths from its data sheet",
    ),
    "a100": Gpu(
        memory=79.1, gemm=215, attention=170, attention_backward=130, flash=170, flash_backward=130, bandwidth=2.0,
        link=300, source="data sheet's 312 TFLOP/s: GEMM at the H100's share, attention as in arXiv 2307.08691",
    ),
    "l40s": Gpu(
        memory=44.4, gemm=249, attention=181, attention_backward=145, flash=181, flash_backward=145, bandwidth=0.86,
        link=25, source="362 TFLOP/s of its data sheet: GEMM at the H100's share, attention at half; links are PCIe",
    ),
    "4090": Gpu(
        memory=23.5, gemm=113, attention=83, attention_backward=66, flash=83, flash_backward=66, bandwidth=1.0,
        link=25, source="165 TFLOP/s of its data sheet: GEMM at the H100's share, attention at half; links are PCIe",
    ),
}  # fmt: skip
"""GPUs by name."""


def gpu(name: str) -> Gpu:
    """A GPU by name.

    Raises:
        SpecError: there is none of that name.

    Example:
        >>> gpu("h100").gemm
        680
    """
    if name not in GPUS:
        raise SpecError(f"unknown GPU {name!r}; {did_you_mean(name, GPUS) or 'expected one of ' + ', '.join(GPUS)}")
    return GPUS[name]


def known_gpu(device_name: str) -> str | None:
    """Which of `GPUS` a device is, by the name that it gives itself.

    Example:
        >>> known_gpu("NVIDIA H100 80GB HBM3"), known_gpu("cpu (2 threads)")
        ('h100', None)
    """
    words = device_name.lower().replace("-", " ").split()
    return next((name for name in GPUS if name in words), None)
