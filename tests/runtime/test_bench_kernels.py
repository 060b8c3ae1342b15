"""Kernels by family, and where a trace's time went."""

from __future__ import annotations

import json

import pytest
import torch

from sftk.runtime.bench_kernels import FAMILIES, family, summarise
from sftk.runtime.bench_profile import profile_call, read_trace

# Names as profilers of H100s and of PyTorch's CPU build print them.
NAMES = {
    "attention": (
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_6_128x128x128_4x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<false, __nv_bfloat16>",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90>>>",
        "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensorptrbf16",
        "triton_tem_fused_flex_attention_backward_0",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "_attend",
    ),
    "gemm": (
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize2x1x1_execute_segment_k_off_kernel",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int>>>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false>",
        "triton_tem_fused_addmm_gelu_3",
        "aten::addmm",
        "aten::bmm",
    ),
    "communication": ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096>)", "c10d::allreduce_"),
    "optimizer": (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
        "aten::_fused_adamw_",
    ),
    "copies": (
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>, unsigned int, 3, 128, 1>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>",
        "triton_poi_fused__to_copy_2",
        "triton_poi_fused_cat_clone_11",
        "aten::copy_",
        "_by_row",
        "_round_tiles",
    ),
    "elementwise": (
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "triton_red_fused__to_copy_add_mul_native_layer_norm_1",
        "triton_poi_fused_cat_mul_4",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>",
        "aten::mul",
        "_forward",
        "_backward",
    ),
    "other": ("a_kernel_of_somebody_else", "autograd::engine::evaluate_function: MulBackward0"),
}


@pytest.mark.parametrize(("name", "expected"), [(name, found) for found, names in NAMES.items() for name in names])
def test_families(name: str, expected: str):
    assert family(name) == expected


def test_every_family_has_an_example():
    assert set(NAMES) == set(FAMILIES)


def kernel(name, ts, dur, cat="kernel", tid=7):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}


def test_time_that_kernels_share_is_busy_once():
    events = [
        kernel("nvjet_tst", 0, 10),
        kernel("ncclDevKernel_AllGather", 4, 10, tid=9),  # beside the product, and 4 longer
        kernel("Memcpy HtoD", 20, 5, cat="gpu_memcpy"),
        kernel("cudaStreamSynchronize", 15, 4, cat="cuda_runtime"),
        kernel("aten::mm", 0, 1000, cat="cpu_op"),
        {"ph": "M", "name": "process_name"},
    ]
    table = summarise(events)
    assert table.span == pytest.approx(25e-6)
    assert table.idle == pytest.approx(6e-6)
    assert {name: share.seconds for name, share in table.families.items()} == pytest.approx(
        {"gemm": 10e-6, "communication": 10e-6, "copies": 5e-6}
    )
    assert table.waits == 1


def test_an_operator_is_charged_without_those_that_it_calls():
    events = [
        kernel("aten::linear", 0, 10, cat="cpu_op"),
        kernel("aten::addmm", 1, 6, cat="cpu_op"),
        kernel("aten::copy_", 2, 2, cat="cpu_op"),
        kernel("aten::addmm", 3, 5, cat="cpu_op", tid=8),  # another thread
    ]
    table = summarise(events)
    assert {name: share.seconds * 1e6 for name, share in table.kernels.items()} == pytest.approx(
        {"aten::addmm": 9, "aten::linear": 4, "aten::copy_": 2}
    )
    assert table.families["gemm"].count == 3


def test_nothing_ran():
    assert summarise([]).span == 0.0


def test_a_trace_is_written_and_read_again(tmp_path):
    a = torch.randn(64, 64)
    path = tmp_path / "traces" / "one.json.gz"
    table = profile_call(lambda: (a @ a).relu(), torch.device("cpu"), path)
    assert table == read_trace(path)
    assert table.families["gemm"].count >= 1
    assert 0 <= table.idle < table.span
    plain = tmp_path / "two.json"
    plain.write_text(json.dumps({"traceEvents": [kernel("nvjet", 0, 2)]}))
    assert read_trace(plain).families["gemm"].seconds == pytest.approx(2e-6)
