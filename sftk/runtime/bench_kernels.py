"""What kernels are for, by their names; and what a trace says of the time that each family takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import attrs

Family = Literal["attention", "gemm", "communication", "optimizer", "copies", "elementwise", "other"]
"""`gemm`: matrix products and convolutions; `copies`: moves, casts, concatenations and fills; `elementwise`: all other
arithmetic, norms and reductions among it; `optimizer`: kernels over lists of tensors; `other`: no rule knows the name."""

_COPY_WORDS = "_to_copy|clone|copy_?|cat|view|_unsafe_view|transpose|permute|slice|unbind|split|stack|expand|fill|zeros|full"
_PATTERNS: tuple[tuple[Family, str], ...] = (
    ("communication", r"nccl|nvshmem|multimem|symm_mem|c10d::|gloo:|record_param_comms"),
    (
        "attention",
        r"flash_?(attn|attention|fwd|bwd)|flex_attention|fmha|sdpa|scaled_dot_product|dot_do_o|convert_dq"
        r"|attention_(for|back)ward|^_(attend|join)$",
    ),
    (
        "gemm",
        r"gemm|nvjet|cublas|cutlass|splitk|gemv|scaled_mm|convol|conv\dd|wgrad|dgrad|fprop|::dot_kernel|triton_tem_|triton_mm"
        r"|aten::(\w*mm|linear|bmm|baddbmm|addmv|mv|dot|einsum|matmul|mkldnn\w*)$",
    ),
    ("optimizer", r"multi_tensor_apply|fused_?adam|_foreach|Optimizer\."),
    (
        "copies",
        r"memcpy|memset|copy_kernel|CatArray|FillFunctor"
        r"|^_(by_row\w*|turned|largest_of_columns|round_(tiles|rows))$"  # to fp8
        rf"|triton_poi_fused_(?:(?:{_COPY_WORDS})_)+\d+$"
        r"|aten::(copy_|_to_copy|to|clone|contiguous|cat|stack|fill_|zero_|zeros|ones|full)$",
    ),
    (
        "elementwise",
        r"elementwise|reduce_kernel|layer_?norm|rms_?norm|softmax|triton_(poi|red|per)_|^_(for|back)ward$|at::native|^aten::",
    ),
)
_RULES: tuple[tuple[Family, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS
)
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a Chrome trace in which a GPU works."""
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuEventSynchronize")
"""Calls in which the host waits for what it reads; the profiler itself waits for the whole device."""


def family(name: str) -> Family:
    """The family of a kernel, or of an operator of PyTorch on the CPU.

    Example:
        >>> family("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16"), family("nvjet_tst_128x256_64x4_1x2_h_bz_NNT")
        ('attention', 'gemm')
    """
    for found, pattern in _RULES:
        if pattern.search(name):
            return found
    return "other"


@attrs.frozen(kw_only=True)
class Share:
    """Time and number of calls of one family or kernel."""

    seconds: float
    count: int


@attrs.frozen(kw_only=True)
class KernelTable:
    """Where the time of a trace went.

    Args:
        span: seconds from the first kernel's start to the last one's end. idle: of it, when no kernel ran.
        families: by family; more than `span` together where kernels overlap.
        kernels: by name, longest first.
        waits: how often the host waited for the device.
    """

    span: float
    idle: float
    families: dict[str, Share]
    kernels: dict[str, Share]
    waits: int


def summarise(events: Iterable[Mapping[str, Any]]) -> KernelTable:
    """The table of a Chrome trace: of the GPU's events where there are any, else of CPU operators, without those they call.

    Args:
        events: its `traceEvents`, in microseconds.

    Example:
        >>> mm = {"ph": "X", "cat": "kernel", "name": "nvjet_tst", "ts": 0.0, "dur": 3e6, "tid": 7}
        >>> table = summarise([mm, mm | {"name": "vectorized_elementwise_kernel", "ts": 4e6, "dur": 1e6}])
        >>> table.span, table.idle, table.families["gemm"]
        (5.0, 1.0, Share(seconds=3.0, count=1))
    """
    complete = [event for event in events if event.get("ph") == "X"]
    device = [event for event in complete if event.get("cat") in DEVICE_CATEGORIES]
    if device:
        timed = [(event["name"], event["dur"]) for event in device]
    else:
        device = [event for event in complete if event.get("cat") == "cpu_op"]
        timed = _own_times(device)
    busy, span = _covered([(event["ts"], event["ts"] + event["dur"]) for event in device])
    kernels = _shares(timed)
    return KernelTable(
        span=span / 1e6,
        idle=(span - busy) / 1e6,
        families=_shares((family(name), duration) for name, duration in timed),
        kernels=kernels,
        waits=sum(event["name"] in WAITS for event in complete if event.get("cat") in ("cuda_runtime", "cuda_driver")),
    )


def _shares(timed: Iterable[tuple[str, float]]) -> dict[str, Share]:
    """Microseconds by name as shares, the largest first."""
    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, duration in timed:
        seconds[name] = seconds.get(name, 0.0) + duration / 1e6
        counts[name] = counts.get(name, 0) + 1
    return {name: Share(seconds=seconds[name], count=counts[name]) for name in sorted(seconds, key=lambda n: -seconds[n])}


def _own_times(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Duration of each event without those that it encloses on its thread."""
    found: list[tuple[str, float]] = []
    open_: dict[Any, list[tuple[float, int]]] = {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        stack = open_.setdefault(event["tid"], [])
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        if stack:
            name, own = found[stack[-1][1]]
            found[stack[-1][1]] = name, max(own - event["dur"], 0.0)
        stack.append((event["ts"] + event["dur"], len(found)))
        found.append((event["name"], event["dur"]))
    return found


def _covered(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """How much of the whole the intervals cover, and the whole."""
    if not intervals:
        return 0.0, 0.0
    busy, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return busy, end - min(start for start, _ in intervals)


FAMILIES: tuple[str, ...] = get_args(Family)
