import pytest
from hypothesis import given
from hypothesis import strategies as st
from sollol.errors import Reason, SollolError
from sollol.names import LONGEST_NAME, billions_in, check_model_name, closest, quoted


@pytest.mark.parametrize(
    "name", ["llama3.1:70b", "org/repo:Q4_K_M", "qwen2.5-0.5b-instruct-q4_0", "a", "A_b+c@d/e", "x" * LONGEST_NAME]
)
def test_names_that_models_have_are_accepted(name):
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "is empty"),
        ("x" * 201, "has 201 characters"),
        ("x" * 10_000, "has 10000 characters"),
        ("../etc/passwd", "contains '..'"),
        ("a/../b", "contains '..'"),
        ("/etc/passwd", "starts with '/'"),
        ("--model", "starts with '-'"),
        ("a\0b", "characters other than"),
        ("a\nb", "characters other than"),
        ("a\n", "characters other than"),
        ("a b", "characters other than"),
        ("a\\b", "characters other than"),
        ("%2e%2e", "characters other than"),
        ("модель", "characters other than"),
        ("\x1b[31m", "characters other than"),
    ],
)
def test_a_bad_name_is_refused_with_its_reason(name, why):
    with pytest.raises(SollolError) as caught:
        check_model_name(name)
    assert caught.value.refusal.reason is Reason.INVALID_MODEL_NAME
    assert why in caught.value.refusal.message


@given(st.text(max_size=400))
def test_any_text_is_accepted_or_refused_in_a_short_printable_message(name):
    try:
        check_model_name(name)
    except SollolError as error:
        message = error.refusal.message
        assert message.isascii() or "…" in message
        assert message.isprintable()
        assert len(message) < 200


@given(st.text(max_size=400))
def test_a_quoted_name_is_one_short_printable_word_in_quotes(name):
    shown = quoted(name)
    assert len(shown) <= 43
    assert shown.isprintable()
    assert shown[0] == shown[-1]
    assert shown[0] in "'\""


def test_a_long_quoted_name_shows_that_it_was_cut():
    assert quoted("x" * 50) == "'" + "x" * 40 + "…'"
    assert quoted("short") == "'short'"


def test_the_closest_names_come_first_and_few():
    known = {"llama3.1:70b", "llama3.1:8b", "llama3.2:3b", "mistral:7b", "qwen2.5:72b"}
    assert closest("lama3.1:70b", known)[0] == "llama3.1:70b"
    assert len(closest("llama3", known)) <= 3
    assert closest("LLAMA3.1:70B", known)[0] == "llama3.1:70b"


def test_nothing_is_suggested_for_a_name_unlike_any_other():
    assert closest("zzzzzzzz", {"llama3.1:70b"}) == ()
    assert closest("anything", ()) == ()


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama3.1:70b", 70),
        ("Llama-3-70B-Instruct", 70),
        ("mixtral-8x7b", 7),
        ("qwen2.5:0.5b", 5),  # the seed's regular expression, kept
        ("llama3.1", None),
        ("phi", None),
        ("7b-of-13b", 7),
        ("٣b", None),
    ],
)
def test_the_first_number_before_a_b_is_the_parameters_in_billions(name, billions):
    assert billions_in(name) == billions
