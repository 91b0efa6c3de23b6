"""adapters.patterns: expressions of a file against `re`, and those for which `re` would never end."""

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora2qlora.adapters.patterns import Expression

NAMES = ["a", "b", "ab", "a.b", "ba.", "aab", "..", "a1b", "abab", "a_b.c", "é"]
ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", "[a-c]", r"[^\w.]", r"\w", r"\W", r"\d", r"\D", r"\s", r"\S"]
ATOMS += ["^", "$", r"\b", r"\B", r"\A", r"\Z", "", "a|ab"]
REPEATS = ["*", "+", "?", "{2}", "{0,2}", "{1,3}", "*?", "+?", "{2,}"]
expressions = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(REPEATS)).map(lambda pair: f"({pair[0]}){pair[1]}"),
        st.tuples(st.sampled_from(["(?=", "(?!", "(?<=a", "(?<!b", "(?P<n>"]), inner).map(
            lambda pair: f"{pair[0]}{pair[1]})"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(expressions)
def test_it_says_what_re_says(pattern):
    try:
        with warnings.catch_warnings(action="ignore"):
            expected = re.compile(pattern)
    except re.error:
        with pytest.raises(ValueError, match="is no regular expression"):
            Expression(pattern)
        return
    expression = Expression(pattern)
    for name in NAMES:
        assert expression.matches(name) == (expected.fullmatch(name) is not None)
        by_peft = re.match(rf"(.*\.)?({pattern})$", name)  # what PEFT does with the keys of rank_pattern
        assert expression.matches_end(name) == (by_peft is not None)


def linears(layers, towers=("language_model", "visual")):
    parts = ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm"]
    return [f"model.{tower}.layers.{i}.{part}" for tower in towers for i in range(layers) for part in parts]


IN_THE_WILD = [
    # Unsloth's get_peft_regex
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))",
    # ms-swift, and recipes for models that see
    r"^(model\.language_model(?=\.).*\.(q_proj|down_proj|k_proj))$",
    r"^(?!.*visual).*(?:q_proj|k_proj|gate_proj|down_proj).*",
    r".*\.layers\.(?:[0-9]|1[0-5])\.self_attn\.(?:q|k)_proj",
    r"(?:model\.)?language_model\.layers\.\d+\.mlp\.gate_proj",
]


@pytest.mark.parametrize("pattern", IN_THE_WILD)
def test_what_libraries_write_goes_on_working_on_large_models(pattern):
    names, expression = linears(80), Expression(pattern)
    expected = [name for name in names if re.fullmatch(pattern, name)]
    assert 0 < len(expected) < len(names)
    assert [name for name in names if expression.matches(name)] == expected


HANGING = ["((a|b|[a-z_.0-9])*)*Q", "(.*)*Q", "(a?){60}a{60}", "(?:(?:a|a)+)+Q", ".*" * 30 + "Q"]
HANGING += ["(?=(.*)*Q).*", "(?:(?:(?:.?){0,60}){0,60}){0,60}Q"]
TOO_LONG = ["(" * 60 + ".*" + ")*" * 60 + "Q"]


@pytest.mark.parametrize("pattern", HANGING + TOO_LONG)
def test_none_hangs(pattern):
    expression = Expression(pattern)
    names = ["a" * 60, *linears(30)]
    if pattern in TOO_LONG:
        with pytest.raises(ValueError, match="takes too long"):
            [expression.matches(name) for name in names]
    else:
        found = [name for name in names if expression.matches(name)]
        assert found == (["a" * 60] if pattern == "(a?){60}a{60}" else [])


def test_steps_are_shared_and_end():
    left = [2_000]
    first, second = Expression("(?:a|b)*", left), Expression(".*.*b", left)
    assert first.matches("ab" * 20)
    used = 2_000 - left[0]
    assert 0 < used < 2_000
    with pytest.raises(ValueError, match=r"'\.\*\.\*b' takes too long"):
        [second.matches("a" * 40) for _ in range(1_000)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is no regular expression"),
        ("*", "is no regular expression"),
        ("(?:" * 5000, "is no regular expression"),
        ("(?i)a", "has flags"),
        ("(?i:a)", "has subpattern, which is not followed"),
        (r"(a)\1", "has groupref, which is not followed"),
        ("(?>a)", "has atomic_group, which is not followed"),
        ("a*+a", "has possessive_repeat, which is not followed"),
    ],
)
def test_what_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        Expression(pattern).matches("aa")


def test_plain_names_cost_no_steps():
    left = [0]
    keys = [Expression(rf"^model\.layers.{i}.self_attn.q_proj", left) for i in range(200)]
    assert sum(key.matches_end(f"model.layers.{i}.self_attn.q_proj") for i, key in enumerate(keys)) == 200
    assert not keys[0].matches_end("x.model.layers.0.self_attn.q_proj")  # ^ is the beginning of the name
