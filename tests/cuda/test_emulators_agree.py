"""PTX and the machine code that ptxas makes of it give the same results, form by form.

Neither emulator was written from the other, so a mistake in reading an instruction shows as a
difference. The forms are those that the kernels use or could use.
"""

from pathlib import Path

import numpy as np
import pytest
from machine_code import Toolchain
from snippets import THREADS, SnippetRunner, module

SHARED = ".shared .align 16 .b8 space[4096];\n"
# %t0: 16 bytes of shared memory for each thread.
PLACE = "mov.u32 %t0, space; shl.b32 %t1, %thread, 4; add.u32 %t0, %t0, %t1;"
# %w7: the thread's own output word.
OWN = "mul.wide.u32 %w7, %index, 4; add.u64 %w7, %out, %w7; mov.b32 %t7, 5;"


def _fold(*expressions: str) -> str:
    """Xor the results of instructions, whose destination is written as {}, into %d."""
    return "mov.b32 %d, 0;" + "".join(
        f"{text.format('%t9')}; xor.b32 %d, %d, %t9;" for text in expressions
    )


FORMS = {
    "loads_with_hints": _fold(
        "ld.global.nc.L1::no_allocate.L2::128B.b32 {}, [%offset]",
        "ld.global.L1::evict_first.b32 {}, [%offset+4]",
        "ld.global.cs.b32 {}, [%offset+8]",
        "ld.global.nc.L1::evict_last.L2::256B.b32 {}, [%in]",
        "ld.global.s8 {}, [%in+3]",
        "ld.global.u16 {}, [%in+6]",
    ),
    "stores_with_hints": OWN + "st.global.cs.b32 [%w7], %a;"
    "st.global.L1::evict_first.b32 [%w7], %b; st.global.cg.b32 [%w7], %c; ld.global.b32 %d, [%w7];",
    "vectors": "ld.global.v4.u8 {%h0, %h1, %h2, %h3}, [%offset]; cvt.u32.u16 %t0, %h2;"
    "ld.global.v2.u16 {%h0, %h1}, [%offset+4]; cvt.u32.u16 %t1, %h1; xor.b32 %d, %t0, %t1;"
    "ld.global.v2.u64 {%w0, %w1}, [%in]; cvt.u32.u64 %t2, %w1; xor.b32 %d, %d, %t2;",
    "shared_vectors": PLACE + "st.shared.v4.b32 [%t0], {%a, %b, %c, %a};"
    "ld.shared.v2.b64 {%w0, %w1}, [%t0]; st.shared.u8 [%t0+1], %a; st.shared.u16 [%t0+2], %b;"
    + _fold(
        "cvt.u32.u64 {}, %w1", "ld.shared.b32 {}, [%t0]", "ld.shared.u8 {}, [%t0+5]",
        "ld.shared.s16 {}, [%t0+6]", "ld.shared.s8 {}, [%t0+7]",
    ),
    "shared_atomics": PLACE + "st.shared.b32 [%t0], %a;" + _fold(
        "atom.shared.add.u32 {}, [%t0], %b", "atom.shared.or.b32 {}, [%t0], %c",
        "atom.shared.max.s32 {}, [%t0], %c", "atom.shared.min.u32 {}, [%t0], %b",
        "atom.shared.exch.b32 {}, [%t0], %c", "atom.shared.cas.b32 {}, [%t0], %c, %a",
        "atom.shared.inc.u32 {}, [%t0], %b", "atom.shared.and.b32 {}, [%t0], %b",
        "atom.shared.xor.b32 {}, [%t0], %a", "ld.shared.b32 {}, [%t0]",
    ),
    "one_word_of_many_threads": "mov.u32 %t0, space; setp.eq.u32 %p, %thread, 0;"
    "@%p st.shared.b32 [%t0], %thread; bar.sync 0; red.shared.add.u32 [%t0], 1; bar.sync 0;"
    "ld.shared.b32 %d, [%t0];",
    "global_atomics": OWN + "st.global.b32 [%w7], %a; red.global.max.s32 [%w7], %b;" + _fold(
        "atom.global.add.u32 {}, [%w7], %c", "atom.global.cas.b32 {}, [%w7], %a, %b",
        "atom.global.exch.b32 {}, [%w7], %b",
    ),
    "barrier_reductions": "setp.gt.s32 %p, %a, 0; bar.red.popc.u32 %d, 0, %p;"
    "bar.red.or.pred %q, 0, %p; @%q add.u32 %d, %d, 1000;"
    "bar.red.and.pred %q, 1, %p; @%q add.u32 %d, %d, 5000;",
    "producers_and_consumers": PLACE + "setp.lt.u32 %p, %thread, 64;"
    "@%p st.shared.b32 [%t0], %a; @%p bar.arrive 1, 128; @%p mov.b32 %d, 0; @%p bra L1;"
    "bar.sync 1, 128; ld.shared.b32 %d, [%t0+-1024]; L1:",
    "copies_with_zeros": PLACE + "and.b32 %t2, %thread, 7;"
    "cp.async.cg.shared.global.L2::128B [%t0], [%in], 16, %t2; cp.async.commit_group;"
    "cp.async.wait_all; ld.shared.b32 %d, [%t0];" + "ld.shared.b32 %t3, [%t0+4];"
    "xor.b32 %d, %d, %t3;",
    "matches": "and.b32 %t1, %a, 3; match.any.sync.b32 %d, %t1, -1;"
    "match.all.sync.b32 %t2|%p, %t1, -1; @%p add.u32 %d, %d, %t2;"
    "elect.sync %t3|%q, -1; @%q add.u32 %d, %d, 7;",
    "votes": "setp.gt.s32 %p, %a, 0; vote.sync.any.pred %q, %p, -1; selp.u32 %d, 1, 0, %q;"
    "vote.sync.all.pred %q, %p, -1; @%q add.u32 %d, %d, 2;"
    "vote.sync.uni.pred %q, %p, -1; @%q add.u32 %d, %d, 4;",
    # Lanes leave the loop after different numbers of rounds and meet again at the shuffle.
    "divergent_loop": "mov.u32 %d, 0; and.b32 %t0, %a, 31;"
    "L1: add.u32 %d, %d, %t0; and.b32 %t1, %d, 3; setp.eq.u32 %p, %t1, 1; @%p bra L2;"
    "shl.b32 %t2, %d, 1; xor.b32 %d, %d, %t2; and.b32 %d, %d, 65535;"
    "L2: sub.u32 %t0, %t0, 1; setp.gt.s32 %q, %t0, 0; @%q bra L1;"
    "shfl.sync.bfly.b32 %t3, %d, 1, 31, -1; add.u32 %d, %d, %t3;",
    "divisions": "or.b32 %b, %b, 1; cvt.u64.u32 %w0, %a; cvt.u64.u32 %w1, %b;"
    "shl.b64 %w0, %w0, 9; div.u64 %w2, %w0, %w1;"
    + _fold("div.u32 {}, %a, %b", "rem.s32 {}, %a, %b", "cvt.u32.u64 {}, %w2"),
    "float_division": "and.b32 %a, %a, 0x3fffffff; or.b32 %a, %a, 0x20000000;"
    "and.b32 %b, %b, 0x3fffffff; or.b32 %b, %b, 0x20000000; div.rn.f32 %d, %a, %b;",
    "conversions": "cvt.rn.f16.s32 %h0, %c;" + _fold(
        "cvt.rni.s32.f32 {}, %a", "cvt.rzi.u32.f32 {}, %b", "cvt.rmi.s32.f32 {}, %c",
        "cvt.rn.f32.u32 {}, %a", "cvt.rz.f32.s32 {}, %b", "cvt.u32.u16 {}, %h0",
        "cvt.rzi.s32.f16 {}, %h0", "cvt.rn.relu.bf16x2.f32 {}, %a, %b",
        "cvt.sat.u8.s32 {}, %c",
    ),
    "wide_integers": "mul.wide.s32 %w0, %a, %b; mad.wide.u32 %w1, %b, %c, %w0;"
    "mul.hi.u64 %w2, %w1, %w0; shr.u64 %w3, %w2, 7; shr.s64 %w4, %w1, 13; xor.b64 %w3, %w3, %w4;"
    "min.s64 %w5, %w0, %w1; setp.lt.s64 %p, %w0, %w1; setp.ge.u64 %q, %w2, %w1;" + _fold(
        "cvt.u32.u64 {}, %w3", "cvt.u32.u64 {}, %w5", "popc.b64 {}, %w1", "clz.b64 {}, %w0",
        "selp.u32 {}, 1, 0, %p", "selp.u32 {}, 2, 0, %q",
    ),
    "packed_bf16": "mul.bf16x2 %t0, %a, %b; add.bf16x2 %t1, %t0, %c; max.bf16x2 %t2, %t1, %a;"
    "neg.bf16x2 %t2, %t2; set.gt.bf16x2.bf16x2 %t3, %t2, %b; fma.rn.relu.bf16x2 %d, %t3, %c, %a;",
    "packed_f16": "mul.f16x2 %t0, %a, %b; add.sat.f16x2 %t1, %t0, %c; sub.f16x2 %t2, %t1, %a;"
    "abs.f16x2 %t2, %t2; set.gt.f16x2.f16x2 %t3, %t2, %b; fma.rn.f16x2 %d, %t3, %c, %a;",
    "packed_constants": "mov.b32 %t0, 0x3C003800; mov.b32 %t1, 0x3F803F00;" + _fold(
        "add.f16x2 {}, %a, %t0", "fma.rn.f16x2 {}, %b, %t0, %c", "fma.rn.bf16x2 {}, %a, %t1, %b",
        "min.bf16x2 {}, %c, %t1", "set.ge.u32.bf16x2 {}, %a, %t1",
    ),
    "comparison_with_predicate": "setp.gt.u32 %p, %a, %b;" + _fold(
        "set.gt.and.u32.f16x2 {}, %a, %b, %p", "set.leu.or.u32.bf16x2 {}, %a, %c, %p",
        "set.lt.xor.u32.f32 {}, %b, %c, %p", "set.ge.f32.s32 {}, %a, %c",
    ),
    "packed_integers": "min.u16x2 %d, %a, %b; max.s16x2 %d, %d, %c; add.u16x2 %d, %d, %a;",
    "special_registers": _fold(
        "mov.u32 {}, %nctaid.x", "mov.u32 {}, %ntid.y", "mov.u32 {}, %lanemask_ge",
        "mov.u32 {}, %lanemask_lt", "mov.u32 {}, %laneid", "mov.u32 {}, %ctaid.x",
    ),
    "stack": ".local .align 4 .b8 stack[64]; mov.u64 %w0, stack; and.b32 %t0, %a, 60;"
    "cvt.u64.u32 %w1, %t0; add.u64 %w1, %w0, %w1; st.local.b32 [stack+8], %b;"
    "st.local.b32 [%w1], %c; ld.local.b32 %d, [stack+8];",
    "byte_permutations": _fold(
        *(f"prmt.b32.{mode} {{}}, %a, %b, %c" for mode in
          ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), "prmt.b32 {}, %a, %b, %c",
    ),
    "bit_fields": _fold(
        "bfe.s32 {}, %a, %b, %c", "bfi.b32 {}, %a, %b, 3, %c", "bmsk.clamp.b32 {}, %b, %c",
        "shf.l.clamp.b32 {}, %a, %b, %c", "shf.r.clamp.b32 {}, %a, %b, %c", "shl.b32 {}, %a, %c",
        "shr.s32 {}, %a, %c", "shr.u32 {}, %a, %c", "bfind.s32 {}, %a", "sad.s32 {}, %a, %b, %c",
        "slct.b32.s32 {}, %a, %b, %c", "abs.s32 {}, %a", "neg.s32 {}, %b",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runners(
    toolchain: Toolchain, cuobjdump: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SnippetRunner, SnippetRunner]:
    ptx = tmp_path_factory.mktemp("forms") / "forms.ptx"
    ptx.write_text(module(FORMS, SHARED))
    return toolchain.snippets("ptx", ptx), toolchain.snippets("sass", ptx, cuobjdump)


def inputs() -> np.ndarray:
    """Return random words, some as small as shifts and widths, and some special floats."""
    random = np.random.default_rng(0)
    words = random.integers(0, 2**32, (2 * THREADS, 3), dtype=np.uint32)
    words[:64, 2] %= 40
    words[64:128, 1] %= 40
    special = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x3F800000, 0x7F800000, 0x7FC00000]
    words[128:192] = random.choice(special, (64, 3))
    words[192:224] &= 0x7FFFFFFF  # a warp that votes yes, and one that votes no
    words[224:] |= 0x80000000
    return words


@pytest.mark.parametrize("form", FORMS)
def test_ptx_and_sass_agree(
    runners: tuple[SnippetRunner, SnippetRunner], form: str, tmp_path: Path
) -> None:
    ptx, sass = (runner.run(form, inputs(), tmp_path) for runner in runners)
    assert len(set(ptx.tolist())) > 1 or form == "one_word_of_many_threads"
    different = np.nonzero(ptx != sass)[0]
    assert len(different) == 0, [hex(x) for x in inputs()[different[0]].tolist()]
