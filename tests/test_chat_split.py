"""The split of chats: nothing lost, no question on both sides, and no row that minds its neighbours."""

import json
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lora2qlora.lab.chat_file import chat_file
from lora2qlora.lab.chat_rows import read_chats
from lora2qlora.lab.chat_split import first_question, split_chats


def chat(question, answer="Aye.", system=None):
    first = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return first + turns


def split(rows, held_out):
    """The sides, or two empty ones where the split refuses."""
    try:
        return split_chats(rows, held_out)
    except ValueError as error:
        if "leaves no chat" not in str(error):
            raise
        return [], []


questions = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
rows_of_chats = st.lists(st.builds(chat, questions, questions), max_size=30)
shares = st.floats(0.01, 0.99)


@given(rows_of_chats, shares)
def test_every_row_is_on_one_side_in_its_order(rows, held_out):
    train, test = split(rows, held_out)
    assume(train)
    numbers = {id(row): number for number, row in enumerate(rows)}
    places = [[numbers[id(row)] for row in side] for side in (train, test)]
    assert sorted(places[0] + places[1]) == list(range(len(rows)))
    assert places == [sorted(side) for side in places]


@given(rows_of_chats, shares, st.randoms())
def test_order_and_other_rows_change_no_side(rows, held_out, random):
    train, test = split(rows, held_out)
    assume(train)
    mixed = random.sample(rows, len(rows))
    sides = [sorted(map(json.dumps, side)) for side in split_chats(mixed, held_out)]
    assert sides == [sorted(map(json.dumps, side)) for side in (train, test)]
    assert split_chats([train[0], *test], held_out) == ([train[0]], test)


@given(rows_of_chats, shares, shares)
def test_a_larger_share_holds_out_what_a_smaller_one_did(rows, one, other):
    small, large = split(rows, min(one, other))[1], split(rows, max(one, other))[1]
    assume(small and large)
    assert all(row in large for row in small)


@given(st.lists(st.sampled_from(string.ascii_letters + string.digits), min_size=1), st.data())
def test_case_punctuation_and_white_space_make_no_other_question(letters, data):
    fill = st.text(string.punctuation + string.whitespace + "«»…\u00a0\u200b", max_size=3)
    spelt = "".join(data.draw(fill) + data.draw(st.sampled_from([x.lower(), x.upper()])) for x in letters)
    plain = "".join(letters)
    assert first_question(chat(spelt + data.draw(fill))) == first_question(chat(plain))
    assert first_question(chat(plain, system="Be brief.")) == first_question(chat(plain, answer="No."))
    assert first_question(chat(plain + "x")) != first_question(chat(plain))


def test_letters_of_other_alphabets_count():
    keys = {
        first_question(chat(text)) for text in ("Straße?", "STRASSE", "где кит?", "где порт?", "鯨", "船")
    }
    assert len(keys) == 5


@given(st.integers(1000, 3000), st.sampled_from([0.1, 0.3, 0.5]))
def test_the_share_is_about_the_one_asked_for(count, held_out):
    _, test = split_chats([chat(f"question {n} of {count}") for n in range(count)], held_out)
    deviation = (count * held_out * (1 - held_out)) ** 0.5  # of the binomial distribution
    assert abs(len(test) - count * held_out) < 6 * deviation


def test_an_empty_side_says_what_would_do():
    same = [chat("Ahoy?"), chat("ahoy!", "No."), chat(" AHOY ")]
    with pytest.raises(ValueError, match=r"leaves no chat to .*3 chats with 1 different first q.*more chats"):
        split_chats(same, 0.5)
    with pytest.raises(ValueError, match=r"no chat to train on: .*Take a smaller held_out"):
        split_chats(same, 0.9999)
    with pytest.raises(ValueError, match=r"no chat to hold out: .*Take a larger held_out"):
        split_chats(same, 0.0001)
    with pytest.raises(ValueError, match="there are 0 chats"):
        split_chats([])


@pytest.mark.parametrize("share", [0, 1, -0.1, 10, float("nan")])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        split_chats([chat("Ahoy?")], share)


def test_a_row_without_a_question_is_named():
    with pytest.raises(ValueError, match="row 1 has no turn of the user"):
        split_chats([chat("Ahoy?"), chat("Ahoy?")[1:]], 0.5)


def test_the_support_desk_asks_no_question_on_both_sides():
    train, test = split_chats(read_chats(chat_file("support-desk")).rows)
    asked = [{first_question(messages) for messages in side} for side in (train, test)]
    assert not asked[0] & asked[1]
    words = [{" ".join(m[0]["content"].lower().split()) for m in side} for side in (train, test)]
    assert not words[0] & words[1]  # by another rule than the split's own
    assert 0.05 < len(test) / (len(train) + len(test)) < 0.2
