"""The counter of static cycles, on listings whose count is worked by hand."""

import pytest

from flash_wtconv_jax.aot import bundles

# A loop of three bundles, each followed by one more before the branch takes effect.
LOOP = """
   0   :  { %s1_s0 = smov 0 }
 0x1 LB: > { %s2_s0 = sphi %s1_s0, %s3_s0 } /* Start region 5 */
 0x2   : > { %s3_s0 = sadd.s32 1, %s2_s0  ;;  %9 = vdelay 3 }
 0x3   : > { %p4_p0 = scmp.ge.s32.totalorder %s3_s0, 4 }
 0x4   : > { %5 = sbr.rel (!%p4_p0) target = $region5 }
 0x5   : > { %6 = vst [vmem:[#allocation1] sm:$0xff] %v7_v0 } /* End region 5 */
 0x6   :  {}
"""


def test_a_loop_is_its_body_times_its_trips():
    total = bundles.count(LOOP, delay_slots=1)
    around, loop = total.loops
    # Five bundles, one of which waits three cycles more, four times; two outside.
    assert total.cycles == 4 * (5 + 3) + 2
    assert (loop.address, loop.depth, loop.entries, loop.trips) == (1, 1, 1, 4)
    assert (loop.bundles, loop.cycles) == (8, 32)
    assert (around.bundles, around.cycles) == (2, 2)


def test_a_loop_in_a_loop_is_entered_in_each_of_its_trips():
    text = """
       0   :  { %s1_s0 = smov 0 }
     0x1 LB: > { %s2_s0 = sphi %s1_s0, %s3_s0  ;;  %s4_s1 = smov 0 } /* Start region 5 */
     0x2 LB: >> { %s5_s1 = sphi %s4_s1, %s6_s1 } /* Start region 7 */
     0x3   : >> { %s6_s1 = sadd.s32 2, %s5_s1 }
     0x4   : >> { %p7_p0 = scmp.lt.s32.totalorder %s6_s1, 6 }
     0x5   : >> { %8 = sbr.rel (%p7_p0) target = $region7 }
     0x6   : >> {} /* End region 7 */
     0x7   : > { %s3_s0 = sadd.s32 1, %s2_s0 }
     0x8   : > { %p9_p1 = scmp.lt.s32.totalorder %s3_s0, 10 }
     0x9   : > { %10 = sbr.rel (%p9_p1) target = $region5 }
     0xa   : > {} /* End region 5 */
     0xb   :  {}
    """
    total = bundles.count(text, delay_slots=1)
    _, outer, inner = total.loops
    assert (outer.entries, outer.trips, outer.bundles) == (1, 10, 5)
    # 0, 2, 4: three trips in each of ten.
    assert (inner.entries, inner.trips, inner.bundles, inner.depth) == (10, 30, 5, 2)
    assert total.cycles == 30 * 5 + 10 * 5 + 2


SKIPPED = """
   0   :  { %s1_s0 = smov {value}  ;;  %s2_s1 = smov 7 }
 0x1   :  { %s3_s2 = smin.u32 %s1_s0, %s2_s1 }
 0x2   :  { %p4_p0 = scmp.eq.s32.totalorder %s3_s2, 7 }
 0x3   :  { %5 = sbr.rel (%p4_p0) target = $region9 }
 0x4   :  {} /* Start/End empty region 8 */
 0x5   :  {}
 0x6   :  {} /* Start region 9 */
"""


@pytest.mark.parametrize(("value", "cycles"), [("3", 7), ("9", 6), ("-1", 6)])
def test_what_a_branch_skips_is_not_counted(value, cycles):
    # As an unsigned number -1 is greater than 7.
    assert bundles.count(SKIPPED.replace("{value}", value), delay_slots=1).cycles == cycles


def test_a_branch_on_data_is_an_error_and_no_guess():
    text = SKIPPED.replace("smov {value}", "vtos %v3_v0")
    with pytest.raises(ValueError, match="bundle 0x3 depends on p4_p0, which is not known"):
        bundles.count(text, delay_slots=1)


@pytest.mark.parametrize(
    "name", ["core id", "megacore core id :: core id", "a :: megacore core id", "core id :: b"]
)
def test_the_first_core_is_counted_of_those_that_share_a_program(name):
    text = SKIPPED.replace("smov {value}", f"sld [smem:[#allocation0]] /* {name} */")
    assert bundles.count(text, delay_slots=1).cycles == 7


@pytest.mark.parametrize("name", ["iteration index", "no core id", "core idle :: x"])
def test_other_scalars_from_memory_are_not_known(name):
    text = SKIPPED.replace("smov {value}", f"sld [smem:[#allocation0]] /* {name} */")
    with pytest.raises(ValueError, match="depends on p4_p0, which is not known"):
        bundles.count(text, delay_slots=1)


def test_a_loop_without_an_end_is_an_error(monkeypatch):
    monkeypatch.setattr(bundles, "_LIMIT", 1000)
    with pytest.raises(ValueError, match="more than 1000 jumps, expected an end"):
        bundles.count(LOOP.replace("sadd.s32 1", "sadd.s32 0"), delay_slots=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a text without bundles"),
        (LOOP.replace("0x2   :", "0x3   :"), "bundle 0x3, expected 0x2"),
        (LOOP.replace("target = $region5", "target = $region6"), "to region 6, which is not there"),
        (LOOP.replace("sbr.rel (!%p4_p0)", "sbr.abs (!%p4_p0)"), "bundle 0x4: unknown branch"),
    ],
)
def test_a_text_of_another_form_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        bundles.count(text, delay_slots=1)


def test_slots_are_weighed_by_how_often_their_bundle_is_executed():
    rows = [
        f"{'1 ' * (i == 5)}{'0 ' * (i != 5)}{'0 ' * (len(bundles.SLOTS) - 1)}" for i in range(7)
    ]
    table = "\n".join(["title", ", ".join(bundles.SLOTS), "2 " * len(bundles.SLOTS), "rows", *rows])
    total = bundles.count(LOOP, table, delay_slots=1)
    assert total.slots["MXU"] == 4
    assert total.busy["MXU"] == 4 / (2 * total.cycles)
