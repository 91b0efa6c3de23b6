"""Damaged files and states: a small part of `make fuzz`, and defects that it must notice."""

import os
import re
import time
from random import Random

import fuzz_runner
import pytest
import torch
from fuzz_judge import Trial, judge, model_digest
from fuzz_safetensors import mutate_file, read, write
from fuzz_targets import all_targets
from fuzz_trees import mutate
from torch import nn

LIMITS = (0.3, 3.0)  # [s] of processor and of wall for a planted defect


def test_nothing_but_what_is_promised():
    """Seeds 0 to 1,999: every target accepts some and refuses some, and none fails."""
    tallies = fuzz_runner.run(all_targets, range(2000))
    assert sum(tally.outcomes.total() for tally in tallies.values()) == 2000
    for name, tally in tallies.items():
        assert tally.outcomes["accepted"] >= 5, name
        assert tally.outcomes.total() - tally.outcomes["accepted"] >= 20, name
    failed = [line for line in fuzz_runner.summary(tallies, 1) if "times, seeds" in line or " from " in line]
    assert not any(tally.failures for tally in tallies.values()), "\n".join(["", *failed])


class Loader:
    """A model and a way to load it that has a defect."""

    def __init__(self, defect):
        self.model, self.defect = nn.Linear(2, 2), defect

    def trial(self, rng: Random) -> Trial:
        return Trial(
            lambda: self.defect(self.model), (ValueError,), lambda: model_digest(self.model), self.accepted
        )

    def accepted(self, result):
        assert result is None, f"it returned {result}"


def refuse(model):
    raise ValueError("refused, as promised")


def leak(model):
    return None + 1


def leak_by_accident(model):
    return int("x")


def say_nothing(model):
    raise ValueError("")


def change_a_number(model):
    model.weight.data[0, 0] += 1
    refuse(model)


def change_a_flag(model):
    model.bias.requires_grad_(False)
    refuse(model)


def change_a_module(model):
    model.extra = nn.Dropout()
    refuse(model)


def use_the_generator(model):
    torch.rand(1)
    refuse(model)


def recurse(model):
    return recurse(model)


def warn(model):
    return torch.ones(()).mT


def answer_wrongly(model):
    return 7


def hang_in_c(model):
    return re.match("(a|a)*b", "a" * 40)


def hang_in_python(model):
    while True:
        pass


def sleep(model):
    time.sleep(600)


def die(model):
    os.abort()


DEFECTS = {
    leak: "TypeError, not promised, from test_fuzz.py:",
    leak_by_accident: "ValueError by accident from test_fuzz.py:",
    say_nothing: "ValueError without a word from test_fuzz.py:",
    change_a_number: "changed before the ValueError from test_fuzz.py:",
    change_a_flag: "changed before the ValueError from test_fuzz.py:",
    change_a_module: "changed before the ValueError from test_fuzz.py:",
    use_the_generator: "changed before the ValueError from test_fuzz.py:",
    recurse: "RecursionError, not promised, from test_fuzz.py:",
    warn: "UserWarning, not promised, from test_fuzz.py:",
    answer_wrongly: "accepted, but AssertionError at test_fuzz.py:",
    hang_in_c: "hangs in __init__.py:",
    hang_in_python: "hangs in test_fuzz.py:",
    sleep: "hangs in test_fuzz.py:",
    die: "the process ends with -6 in test_fuzz.py:",
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_defect_is_noticed(defect):
    """Of four inputs one meets the defect; the others, before and after it, are judged all the same."""

    def targets(folder):
        return {name: Loader(refuse if name else defect).trial for name in (1, 0, 2, 3)}

    tallies = fuzz_runner.run(targets, range(4, 8), limits=LIMITS)
    (kind,) = tallies[0].failures
    assert kind.startswith(DEFECTS[defect])
    assert tallies[0].failures[kind] == [5]
    assert [tallies[name].outcomes for name in (1, 2, 3)] == [{"ValueError": 1}] * 3
    assert not any(tallies[name].failures for name in (1, 2, 3))
    assert any("1 times, seeds [5]" in line for line in fuzz_runner.summary(tallies, 1))


def test_an_input_that_cannot_be_made_is_a_failure():
    def broken(rng):
        raise KeyError("mutator")

    tallies = fuzz_runner.run(lambda folder: {"broken": broken, "good": Loader(refuse).trial}, range(4))
    (kind,) = tallies["broken"].failures
    assert kind.startswith("no input: KeyError from test_fuzz.py:")
    assert tallies["broken"].failures[kind] == [0, 2]
    assert tallies["good"].outcomes == {"ValueError": 2}


def test_seconds_end_a_run():
    tallies = fuzz_runner.run(lambda folder: {"one": Loader(refuse).trial}, range(10**9), seconds=0.5)
    assert 0 < tallies["one"].outcomes.total() < 10**6


def test_a_seed_is_an_input():
    """The same seed gives the same verdict in another process, whatever was tried before it."""

    def judged(seeds):
        every = fuzz_runner.verdicts(all_targets, seeds)
        return [(name, seed, verdict.outcome, verdict.failure) for name, seed, verdict in every]

    together = judged(range(40))
    assert [seed for _, seed, *_ in together] == list(range(40))
    for seed in (10, 11, 25, 36):
        assert judged(range(seed, seed + 1)) == [together[seed]]


def test_edits_leave_the_original_and_differ():
    tree = {"a": [1, {"b": 2}], "c": {"d": None}}
    seen = {repr(mutate(Random(seed), tree, lambda rng, old: "new")) for seed in range(300)}
    assert tree == {"a": [1, {"b": 2}], "c": {"d": None}}
    assert len(seen) > 100
    assert sum(text == repr(tree) for text in seen) <= 1


def test_damaged_files_differ_and_the_writer_is_right():
    from safetensors.torch import load, save

    good = save({"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(1)}, metadata={"format": "pt"})
    assert torch.equal(load(write(*read(good)))["x"], torch.arange(6.0).reshape(2, 3))
    damaged = [mutate_file(Random(seed), good) for seed in range(400)]
    assert len(set(damaged)) > 250
    loaded = refused = 0
    for data in damaged:
        trial = Trial(lambda data=data: load(data), (Exception,), lambda: None)
        verdict = judge(trial)
        loaded, refused = loaded + (verdict.outcome == "accepted"), refused + (verdict.outcome != "accepted")
    assert loaded > 50
    assert refused > 50
