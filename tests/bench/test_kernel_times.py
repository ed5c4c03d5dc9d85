"""Kernels sorted by name: names as profiles of real GPUs have them."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from wantrt.bench.kernel_times import KernelTime, breakdown, classify, collect, split

NAMES = {
    "gemm": (
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
        "nvjet_sm90_tst_384x80_64x3_4x1_v_bz_coopA_TNT",
        "nvjet_tst_128x192_64x5_4x1_v_badd_NNT",
        "nvjet_tst_64x16_64x16_2x1_v_bz_splitK_TNT",
        "nvjet_hsh_256x128_64x4_2x1_v_bz_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_"
        "segment_k_off_kernel__5x_cublas",
        "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize64x256x8",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_relu_f2f_stages_64x3_tn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8"
        ">(cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16"
        ">(cublasLt::cublasSplitKParams<float>)",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16>(float)",
        "void gemmSN_NN_kernel<float, 256, 4, 2, 8, 3, 4, false>(float)",
        "triton_tem_fused_addmm_gelu_4",
        "triton_tem_fused_mm_t_view_14",
        "triton_mm_27",
    ),
    "attention": (
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_"
        "cga1x1x1_kernel0_0",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false"
        ", cutlass::bfloat16_t, Flash_kernel_traits<128, 128, 64, 4, cutlass::bfloat16_t> >, false,"
        " false, false, false, true, true, false, false>(pytorch_flash::Flash_fwd_params)",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::"
        "CollectiveMainloopFwdSm90<2, cute::tuple<cute::C<1>, cute::C<1>, cute::C<1> >",
        "flash_fwd_splitkv_kernel",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass"
        "::bfloat16_t, cutlass::arch::Sm80, true, 64, 128, 128, true, true>::Params)",
        "fmha_cutlassF_f32_aligned_32x128_gmem_sm80",
        "fmhaSm100aKernel_QE4m3KvE2m1OE4m3H128PagedKvDenseP16VarSeqQ8Kv128PersistentSwapsAbForGen",
        "triton_tem_fused_flex_attention_3",
    ),
    "rest": (
        "triton_poi_fused_addmm_gelu_view_3",
        "triton_per_fused__scaled_dot_product_cudnn_attention__to_copy__unsafe_view_add_4",
        "triton_red_fused__scaled_dot_product_cudnn_attention__to_copy_mean_mul_permute_pow_rsqrt",
        "triton_poi_fused__scaled_dot_product_flash_attention_add_mul_permute_stack_sub_unbind_vie",
        "triton_red_fused_add_mul_native_layer_norm_unsqueeze_0",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std"
        "::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>)",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native"
        "::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::unrolled_elementwise_kernel<at::native::GeluCUDAKernelImpl(at::"
        "TensorIteratorBase&, at::native::GeluType)>",
        "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16> >",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "modulate_kernel",
        "qk_norm_rope_kernel",
        "gated_residual_norm_kernel",
        "rms_silu_kernel",
    ),
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in NAMES for name in NAMES[kind]])
def test_classify(kind, name):
    assert classify(name) == kind


def event(name, us, device=DeviceType.CUDA, annotation=False):
    return SimpleNamespace(
        name=name,
        device_type=device,
        is_user_annotation=annotation,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
    )


def test_collect_counts_kernels_alone():
    events = [
        event("nvjet_tst_a", 30.0),
        event("nvjet_tst_a", 50.0),
        event("modulate_kernel", 6.0),
        event("cudaLaunchKernel", 400.0, device=DeviceType.CPU),
        event("a range", 90.0, annotation=True),
        event("## Call CompiledFxGraph f6dnn ##", 90.0),
    ]
    assert collect(events, repeats=2) == {
        "nvjet_tst_a": KernelTime(us=40.0, count=1.0),
        "modulate_kernel": KernelTime(us=3.0, count=0.5),
    }


def test_events_of_a_real_profile_have_what_is_read():
    with profile(activities=[ProfilerActivity.CPU]) as found:
        torch.randn(8, 8) @ torch.randn(8, 8)
    events = found.events()
    assert collect(events, repeats=1) == {}  # nothing of a CPU counts
    assert "aten::mm" in {event.name for event in events}
    for event in events:
        assert event.device_type.name == "CPU"
        assert event.is_user_annotation in (False, None)
        assert event.time_range.elapsed_us() >= 0


def test_split_and_breakdown():
    times = {
        "nvjet_tst_a": KernelTime(4000, 2),
        "flash_fwd_kernel": KernelTime(2000, 1),
        "rope_kernel": KernelTime(100, 1),
        "modulate_kernel": KernelTime(400, 2),
    }
    assert split(times) == {"gemm": 4.0, "attention": 2.0, "rest": 0.5}
    assert [row["kernel"] for row in breakdown(times, "rest")] == ["modulate_kernel", "rope_kernel"]
    assert breakdown(times, "rest")[0] == {"kernel": "modulate_kernel", "us": 400, "launches": 2}
