"""The ledger of a divided model against what each of several processes holds, and sends."""

import pytest
import torch
from lora2qlora.memory import (
    ADAMW,
    ADAMW_8BIT,
    PHASES,
    SGD,
    SGD_MOMENTUM,
    SHAPES,
    Full,
    LlamaShape,
    LoRA,
    QLoRA,
    divided_memory,
    forecast,
    static_memory,
    step_flops,
    step_traffic,
    training_memory,
)
from processes import together
from ranked import measured_steps
from test_memory import SETTINGS, built
from torch.utils.flop_counter import FlopCounterMode

FP32, BF16 = torch.float32, torch.bfloat16
TINY = LlamaShape(64, 2, 4, 176, 500, kv_heads=2)
ODD = LlamaShape(42, 2, 3, 77, 101, kv_heads=1)  # nothing divides evenly
DEEP = LlamaShape(96, 6, 6, 256, 300, kv_heads=3, tied=True)
WIDE = LlamaShape(192, 2, 3, 512, 4000, kv_heads=1)
QUICK = [
    (ODD, QLoRA(3, dtype=FP32, compute_dtype=FP32), 2, 24, True, ADAMW),
    (TINY, Full(FP32), 2, 24, True, SGD_MOMENTUM),
    (DEEP, LoRA(8), 2, 20, False, ADAMW),
    (TINY, QLoRA(4, group_size=None, dtype=FP32), 1, 24, False, SGD),
]
MORE = [
    (ODD, Full(FP32), 3, 17, False, ADAMW),
    (DEEP, Full(), 2, 40, True, SGD),
    (WIDE, QLoRA(16), 1, 64, True, ADAMW),
    (WIDE, LoRA(3, targets=("q_proj", "v_proj")), 2, 48, True, ADAMW),
    (ODD, QLoRA(5, targets=("down_proj",)), 2, 30, False, ADAMW),
]


def check(ranks, settings, seconds=300):
    answers = together(ranks, measured_steps, settings, seconds=seconds)
    for i, setting in enumerate(settings):
        shape, method, batch, length, checkpointing, optimizer = setting
        static, peaks, sent, calls = answers[0][i]
        assert divided_memory(shape, method, optimizer, ranks).total == static
        predicted = forecast(*setting, ranks=ranks)
        for phase, peak in zip(PHASES, peaks, strict=True):
            assert predicted.peaks[phase].total == pytest.approx(peak, rel=0.001), (setting, phase)
        assert all(max(answer[i][1]) <= max(peaks) for answer in answers)  # the first holds the most
        traffic = step_traffic(shape, method, ranks, batch, length, checkpointing)
        assert (traffic.all_gather, traffic.reduce_scatter) == tuple(sent)
        assert traffic.calls == tuple(calls)


def test_two_ranks_hold_and_send_what_the_ledger_says():
    check(2, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_so_do_more(ranks):
    check(ranks, QUICK[:2] + MORE, seconds=500)


def test_one_rank_is_one_process():
    for shape, method, *_, optimizer in SETTINGS:
        assert divided_memory(shape, method, optimizer) == static_memory(shape, method, optimizer)


def test_what_divides_and_what_does_not():
    shape = SHAPES["LLaMA-7B"]
    for method in (Full(), LoRA(), QLoRA()):
        one, *more = (training_memory(shape, method, 1, 512, True, ranks=n) for n in (1, 8, 16))
        static = [divided_memory(shape, method, ADAMW, n).total for n in (1, 8, 64)]
        assert static[0] / 8.2 < static[1] < static[0] / 7.5
        assert static[0] / 66 < static[2] < static[0] / 40
        totals = [ledger.total for ledger in more]
        assert one.total > totals[0] > totals[1] > 1.0e9  # head, logits and a gathered block stay
    # Rows are not cut: beyond 16 ranks each holds a row of an A of rank 16, or of padding, and gathers all.
    totals = [training_memory(shape, QLoRA(16), 1, 512, True, ranks=n).total for n in (16, 64, 512)]
    assert totals[2] > totals[1]
    assert training_memory(shape, QLoRA(), ranks=1) == training_memory(shape, QLoRA())


@pytest.mark.parametrize("ranks", [0, -1, 1.5, True, None, "2"])
def test_ranks_that_make_no_sense(ranks):
    for function in (
        lambda: training_memory(TINY, QLoRA(), ranks=ranks),
        lambda: divided_memory(TINY, QLoRA(), ADAMW_8BIT, ranks),
        lambda: step_traffic(TINY, QLoRA(), ranks),
    ):
        with pytest.raises((ValueError, TypeError), match="ranks must be"):
            function()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "method", [Full(FP32), LoRA(4, dtype=FP32), QLoRA(4, dtype=FP32, compute_dtype=FP32)]
)
def test_flops_are_those_of_torchs_counter(method, checkpointing):
    """All of torch's count but attention's own, whose share is known: its products are no weights'."""
    model = built(TINY, method, checkpointing)
    ids = torch.randint(TINY.vocabulary, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counted = sum(
        flops
        for operation, flops in counter.get_flop_counts()["Global"].items()
        if operation.__name__.split(".")[0] in ("mm", "addmm", "bmm")
    )
    expected = step_flops(TINY, method, 64, checkpointing)
    assert counted == pytest.approx(expected, rel=0.12)
