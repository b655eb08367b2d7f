"""Cycles counted from what a TPU's compiler writes: kernels by their bundles, programs by their schedule."""

import json

import pytest

from wanjax.errors import InputError
from wanjax.report import memory, static
from wanjax.report.bundles import read_kernel, read_kernels
from wanjax.report.compiled import Case
from wanjax.report.cycles import CHIPS, Count
from wanjax.report.hlo import collectives, parse

# As libtpu writes it; shortened. A grid of 4 steps: a branch with the products, one without, and what is in neither.
KERNEL = """\
LB: loop body
   0   :  { %s1 = inlined_call_operand.hbm [shape: bf16[1,2048,128], index: 0, kind: input, shape index: {}]
/* operand 0, window shape is bf16[1,1024,128], while the full shape is bf16[1,2048,128] */
;; %s2 = inlined_call_operand.hbm [shape: bf16[1,4096,128], index: 1, kind: input, shape index: {}]
/* operand 1, window shape is bf16[1,2048,128], while the full shape is bf16[1,4096,128] */ }
 0x1 LB: > { %s9 = sadd.s32 1, %s8 }
 0x2   : > { %p1 = scmp.ge.s32.totalorder %s9, 6 /* loop exit test */ }
 0x3   : > { %12 = sbr.rel (%p2) target = $region5 }
 0x4   : > { nop }
 0x5   :  {}
 0x6   :  {}
 0x7   :  {}
 0x8   : > { %v1 = vmatmul.mubr.bf16.vlgmr.msra.gmra.mxu0 %v2 }
 0x9 LB: >> { %s4 = sadd.s32 1, %s3 }
 0xa   : >> { %p3 = scmp.ge.s32.totalorder %s4, 10 /* loop exit test */ }
 0xb   : > { %v9 = vadd.f32 %v8, %v7 }
 0xc   : >> { %13 = sbr.rel (!%p3) target = $region9 }
 0xd PF: > { %s5 = smov 0 } /* Start/End empty region 5 */
 0xe   : > { %14 = sbr.rel (%p4) target = $region7 }
 0xf   : > { nop }
0x10   :  {}
0x11   :  {}
0x12   :  {}
0x13   : > { %v3 = vadd.f32 %v4, %v5 }
0x14   : > { %v6 = vadd.f32 %v4, %v5
 ;; continued }
0x15 LB: >> { %p5 = scmp.ge.s32.totalorder %s6, %s7 /* loop exit test */ }
0x16 PF: > { %15 = sbr.rel (!%p1) target = $region3 } /* Start/End empty region 7 */
0x17   :  { %16 = vsyncpa [#allocation6], 1 }
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "12345-flash_forward.1-01-final_bundles.txt").write_text(KERNEL)
    (tmp_path / "9999-flash_forward.1-01-final_bundles.txt").write_text(" 0   :  { nop }\n")  # of an earlier program
    (tmp_path / "12346-fusion.3-01-final_bundles.txt").write_text(" 0   :  { nop }\n 0x1   :  { nop }\n")
    return tmp_path


def test_a_kernel_by_its_bundles(folder):
    kernel = read_kernel(read_kernels(folder)["flash_forward.1"])
    # Products and their loop of 10 passes of 4 bundles, one of them marked as outside; behind it 2 more.
    assert kernel.block == 1 + 10 * 4
    always, seldom = 7 + kernel.block + 1 + 5 + 1, 2  # a row of the grid is of two steps
    assert kernel.step == always + seldom / 2
    assert (kernel.steps, kernel.tiles) == (4, 2.0)
    assert kernel.ragged == 1
    assert kernel.cycles == 2 + 4 * kernel.step


PROGRAM = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/home/someone/wanjax/models/dit.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=17 end_line=17 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%product (p.1: bf16[8,4], p.2: bf16[4,4]) -> bf16[8,4] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %p.2 = bf16[4,4]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[8,4]{1,0} convolution(%p.1, %p.2), dim_labels=bf_io->bf
}
%gathered (p.4: bf16[1,4]) -> bf16[4,4] {
  ROOT %all-gather.9 = bf16[4,4]{1,0} all-gather(%p.4), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
}
%body (p.3: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %i = s32[] get-tuple-element(%p.3), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%p.3), index=1
  %gather.1.call-start = ((bf16[1,4]{1,0}), bf16[4,4]{1,0}, u32[]{:S(8)}) call-start(%w), to_apply=%gathered
  %fusion.1 = bf16[8,4]{1,0} fusion(%x, %v), kind=kOutput, calls=%product, metadata={op_name="jit(step)/dot
spans lines" stack_frame_id=1}, backend_config={"estimated_cycles":"1000"}
  %gather.1.call-done = bf16[4,4]{1,0} call-done(%gather.1.call-start)
  %flash_forward.1 = bf16[1,2048,128]{2,1,0} custom-call(%x, %x), custom_call_target="tpu_custom_call"
  %flash_forward.2 = bf16[1,2048,128]{2,1,0} custom-call(%x, %x), custom_call_target="tpu_custom_call"
  %flash_forward.3 = bf16[1,2048,128]{2,1,0} custom-call(%v), custom_call_target="tpu_custom_call"
  ROOT %tuple.1 = (s32[], bf16[8,4]{1,0}) tuple(%i, %fusion.1)
}
%condition (p.5: (s32[], bf16[8,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.5), index=0
  ROOT %lt = pred[] compare(%i.2, %bound), direction=LT
}
ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %fusion.3 = bf16[8,4]{1,0} fusion(%x.1), kind=kLoop, calls=%moves
  %while.1 = (s32[], bf16[8,4]{1,0}) while(%tuple.0), condition=%condition, body=%body
}
%moves (p.6: bf16[8,4]) -> bf16[8,4] {
  ROOT %copy.1 = bf16[8,4]{0,1} copy(%p.6)
}
"""


def test_a_program_by_its_schedule(folder):
    count = Count(PROGRAM, folder, "v6e:2x4")
    kernel = read_kernel(read_kernels(folder)["flash_forward.1"]).cycles
    in_memory = 2**18 * 2 / 1640e9 * CHIPS["v6e"].clock  # more than the bundles; the third has none of its shape
    layer = count.layer(3)
    assert layer["matmul"] == 1000
    assert kernel < in_memory
    assert layer["attention"] == pytest.approx(3 * in_memory, rel=1e-3)
    assert layer["wait"] == 0  # the weight travels while the product is made
    assert count.totals()["copies"] == 2  # by its bundles: there is no estimate
    assert count.items["fusion.1", "matmul"].source == "models/dit.py:17"
    assert count.items["fusion.1", "matmul"].times == 3
    assert count.payload == {"all-gather": 3 * 32 * 3 / 4}
    assert set(count.kernels) == {"flash_forward.1", "flash_forward.2"}  # equal ones are written once


def test_a_gather_of_another_core_is_asynchronous():
    (gather,) = collectives(parse(PROGRAM))
    assert gather[:4] == ("all-gather", 32, 3, True)


def test_loops_whose_first_pass_the_compiler_has_taken_out(folder):
    count = Count(PROGRAM, folder, "v6e:2x4")
    assert count.layer(4)["matmul"] == count.layer(5)["matmul"] == 1000
    assert count.layer(6)["matmul"] == count.layer(2)["matmul"] == 0


def test_a_program_of_layers_as_a_whole(folder):
    (folder / static.PROGRAM).write_text(PROGRAM)
    facts = {"program": "DiT step", "target": "v6e:2x4", "layers": 3, "runs": 50, "peak": 2**30}
    (folder / static.FACTS).write_text(json.dumps(facts))
    count, cycles, _ = static.read(folder)
    assert cycles.layer["matmul"] == 1000
    assert cycles.once == {"attention": 0, "matmul": 0, "elementwise": 0, "copies": 2, "wait": 0}
    assert cycles.total == pytest.approx(sum(count.totals().values()))
    assert cycles.seconds == cycles.total / CHIPS["v6e"].clock


def test_what_cannot_be_counted_is_said_in_one_line():
    config, dit, *_ = memory.load("configs/flf2v_14b_720p.py")
    with pytest.raises(InputError, match=r"no cycles are known of h100:8; accepted: .*v6e"):
        static.static_cycles(Case(config, dit, "h100:8", "data=8"))
    with pytest.raises(InputError, match=r"the step does not compile for v6e:2x4 \(.*accepted"):
        static.static_cycles(Case(config, dit, "v6e:2x4", "data=3"))
