"""A target: regular expressions as `load_adapter` matches them, against Python's own, which is slower."""

import re
import warnings
from pathlib import Path
from random import Random

from fuzz_json import ENDLESS, pattern
from fuzz_judge import Trial
from lora2qlora.adapters.patterns import Expression

NAMES = (
    "q_proj",
    "layers.0",
    "0.q_proj",
    "a.b.c",
    "lm_head",
    "",
    "proj",
    "a_0",
    "q.proj",
    "É.x",
    "a a",
    "Q_PROJ",
)


def pattern_targets(folder: Path) -> dict:
    """The target by its name: a function of a Random that gives a Trial."""

    def expression(rng: Random) -> Trial:
        text = pattern(rng)
        names = [*rng.sample(NAMES, 4), "".join(rng.choices("aq_.0", k=rng.randrange(8)))]

        def match() -> list[tuple[bool, bool]]:
            made = Expression(text)
            return [(made.matches(name), made.matches_end(name)) for name in names]

        def accepted(found) -> None:
            if text in ENDLESS:
                return  # Python itself would not come to an end
            warnings.simplefilter("ignore", FutureWarning)
            whole = [re.fullmatch(text, name) is not None for name in names]
            ends = [re.match(rf"(?:.*\.)?(?:{text})\Z", name) is not None for name in names]
            assert found == list(zip(whole, ends, strict=True)), f"{text!r} of {names}"

        return Trial(match, (ValueError,), lambda: None, accepted)

    return {"expressions": expression}
