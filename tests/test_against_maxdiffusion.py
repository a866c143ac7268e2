"""What `benchmarks.against_maxdiffusion` counts by itself: kernels in a program's text, their operations and cycles."""

import pytest

from benchmarks import against_maxdiffusion
from benchmarks.against_maxdiffusion import Program, to_markdown
from benchmarks.programs import Kernel, find_kernels, kernel_operations

# Cut from programs of the TPU compiler, jax 0.10.2.
TEXT = """HloModule jit_apply

%body.1 (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %splash_mha_fwd_no_residuals.3 = (f32[512,128]{1,0:T(8,128)}, bf16[12,8192,128]{2,1,0:T(8,128)(2,1)}) custom-call(\
%a, %b, /*index=5*/%c), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[1,16,1]{2,1,0}, \
bf16[12,8192,130]{2,1,0}, bf16[12,512,130]{2,1,0}, bf16[12,512,128]{2,1,0}, s32[8192,128]{1,0}}, metadata={op_name="x"}
  %pad.1 = bf16[12,512,128]{2,1,0} custom-call(%d), custom_call_target="other"
}

%condition.1 (p: (s32[], bf16[8])) -> pred[] {
}

ENTRY %main (p: bf16[8]) -> bf16[8] {
  %while.1 = (s32[], bf16[8]) while(%t), condition=%condition.1, body=%body.1
}
"""
Q, K, V = (12, 8192, 130), (12, 512, 130), (12, 512, 128)


def test_kernels_are_found_with_their_shapes_and_counts():
  found = list(find_kernels(TEXT, 30))
  assert found == [(30, Kernel("splash_mha_fwd_no_residuals", (Q, K, V), ((512, 128), (12, 8192, 128))))]


@pytest.mark.parametrize(
  ("name", "kind", "channels"),
  [  # by hand: products over 130 channels of keys take as long as 256, those over 128 of values 128
    ("splash_mha_fwd_residuals", "forward", 256 + 128),
    ("splash_mha_dq", "dq", 2 * 256 + 128),
    ("splash_mha_dkv_segmented", "dkv", 2 * 256 + 2 * 128),
  ],
)
def test_operations_of_kernels(name, kind, channels):
  outputs = {"forward": (Q,), "dq": (Q,), "dkv": (K, V)}[kind]
  assert kernel_operations(Kernel(name, (Q, K, V), outputs)) == (kind, 2 * 12 * 8192 * 512 * channels)


def test_fused_gradients_are_known_by_their_third_output():
  kind, operations = kernel_operations(Kernel("splash_mha_dkv", (Q, K, V), (Q, K, V)))
  assert kind == "fused" and operations == 2 * 12 * 8192 * 512 * (3 * 256 + 2 * 128)


def test_other_kernels_are_refused():
  with pytest.raises(ValueError, match="not a kernel of attention"):
    kernel_operations(Kernel("gather", (Q, K, V), (Q,)))


def test_totals_depend_on_the_efficiency():
  figures = dict(memory_tb=1.0, temporary_gb=1.0, collective_gb=1.0, seconds=1.0)
  peer, ours = (
    Program(case="forward/1.3b/480p/v5p:2x2x1", side=side, cycles=cycles, kernels={"forward": 262144e9}, **figures)
    for side, cycles in (("maxdiffusion", 4e9), ("univid_jax", 1e9))
  )
  assert peer.total(1.0) == 5e9 and peer.total(0.5) == 6e9
  assert "6.00 / 3.00 = 2.00 | 8.00 / 5.00 = 1.60" in to_markdown(peer, ours, [0.5, 0.25])


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--cases=forward/1.3b/360p/v5p:2x2x1", "is not TASK/MODEL/SIZE/TOPOLOGY"),
    ("--cases=forward/1.3b/480p/v5p:1x1x1", "a multiple of 4 chips"),
    ("--cases=calibration/v4", "calibration takes v5e, v5p, v6e, got 'v4'"),
    ("--efficiency=0", "--efficiency must be shares above 0"),
    ("--maxdiffusion=nowhere", "--maxdiffusion must be the folder"),
  ],
)
def test_wrong_flags(flag, message, capfd):
  assert against_maxdiffusion.main(["against_maxdiffusion", flag]) == 1
  assert message in capfd.readouterr().err
