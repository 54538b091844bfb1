import pytest
from sollol.errors import Reason, Refusal, Retry, SollolError
from sollol.inference import AvailableModel
from structlog.testing import capture_logs

from sollold.admission import Admission
from tests.fakes.fake_keys import FakeKeys, admission_of, key_of, token_of

MODEL = "llama3.1:8b"
UNREADABLE = SollolError(Refusal(reason=Reason.KEYS_UNREADABLE, message="cannot read"))

UNHEARD = SollolError(Refusal(reason=Reason.NO_NODES, message="not heard yet", retry=Retry.RETRYABLE))


class Clock:
    def __init__(self, now_s=1000.0):
        self.now_s = now_s

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def limited(clock, **limits):
    keys = FakeKeys(key_of("alice", **limits), key_of("bob"))
    return keys, Admission(keys, mode="auto", known={}.get, clock=clock)


def refusal_of(admission, token, model=MODEL) -> Refusal:
    with pytest.raises(SollolError) as caught:
        admission.admit(token, model)
    return caught.value.refusal


def test_without_keys_everybody_is_admitted():
    assert admission_of().admit(None, MODEL).asker == ""
    assert admission_of().admit("unused", MODEL).asker == ""


def test_a_key_is_not_refused_for_its_scope_while_nobody_can_tell_what_an_alias_means():
    def unknown_yet(_name):
        raise UNHEARD

    admission = Admission(FakeKeys(key_of("alice", models=(MODEL,))), mode="auto", known=unknown_yet)

    assert refusal_of(admission, token_of("alice"), "alias") == UNHEARD.refusal


def test_once_there_is_a_key_every_request_needs_one():
    admission = admission_of(key_of("alice"))
    assert admission.admit(token_of("alice"), MODEL).asker == "alice"
    assert refusal_of(admission, None).reason is Reason.KEY_MISSING
    assert refusal_of(admission, "").reason is Reason.KEY_MISSING
    assert refusal_of(admission, "sk-sollol-guess").reason is Reason.KEY_INVALID


def test_a_head_whose_only_key_was_revoked_is_not_open():
    assert refusal_of(admission_of(key_of("alice", revoked_unix_s=1.0)), None).reason is Reason.KEY_MISSING


def test_where_keys_are_always_needed_none_there_is_admits_nobody():
    assert refusal_of(admission_of(mode="always"), None).reason is Reason.KEY_MISSING
    assert refusal_of(admission_of(mode="always"), "sk-sollol-guess").reason is Reason.KEY_INVALID


def test_where_none_is_ever_needed_the_file_does_not_matter():
    admission = Admission(FakeKeys(), mode="never", known={}.get)
    admission._keys.keys = UNREADABLE
    assert admission.admit(None, MODEL).asker == ""


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("token", [None, token_of("alice")])
def test_keys_that_cannot_be_read_admit_nobody(mode, token):
    admission = Admission(FakeKeys(), mode=mode, known={}.get)
    admission._keys.keys = UNREADABLE
    assert refusal_of(admission, token).reason is Reason.KEYS_UNREADABLE


def test_unknown_and_revoked_look_the_same_outside_and_not_in_the_log():
    admission = admission_of(key_of("alice"), key_of("bob", revoked_unix_s=1.0))
    with capture_logs() as lines:
        unknown = refusal_of(admission, "sk-sollol-guess")
        revoked = refusal_of(admission, token_of("bob"))
    assert unknown == revoked
    assert [(line["why"], line["key_name"]) for line in lines] == [("unknown", ""), ("revoked", "bob")]
    assert "sk-sollol" not in repr(lines)


def test_an_expired_key_says_so():
    keys = FakeKeys(key_of("alice", expires_unix_s=100.0))
    wall = Clock(99.0)
    admission = Admission(keys, mode="auto", known={}.get, wall=wall)
    admission.admit(token_of("alice"), MODEL)
    wall.now_s = 100.0
    assert refusal_of(admission, token_of("alice")).reason is Reason.KEY_EXPIRED


def test_a_key_is_for_the_models_that_it_names_by_whatever_name_they_are_asked():
    aliases = {"small": MODEL, "big": "llama3.1:70b", MODEL: MODEL}
    admission = admission_of(key_of("alice", models=("*:8b",)), known=aliases)
    for name in (MODEL, "small"):
        admission.admit(token_of("alice"), name)
    refusal = refusal_of(admission, token_of("alice"), "big")
    assert refusal.reason is Reason.KEY_SCOPE
    assert "*:8b" in refusal.message
    assert refusal_of(admission, token_of("alice"), "nobody-has-this").reason is Reason.KEY_SCOPE


def test_a_key_of_some_models_learns_no_other_name_from_a_wrong_one():
    admission = Admission(FakeKeys(key_of("alice", models=("llama*",))), mode="auto", known={MODEL: MODEL}.get)

    refusal = refusal_of(admission, token_of("alice"), "llama3.1:80b")

    assert (refusal.reason, MODEL in refusal.message) == (Reason.MODEL_NOT_FOUND, False)


def test_only_models_in_scope_are_visible():
    models = (AvailableModel(name="a:8b"), AvailableModel(name="b:70b"))
    admission = admission_of(key_of("alice", models=("a:*",)), key_of("bob"))
    assert admission.visible(admission.authenticate(token_of("alice")), models) == models[:1]
    assert admission.visible(admission.authenticate(token_of("bob")), models) == models


def test_no_more_requests_run_at_the_same_time_than_the_key_may():
    admission = admission_of(key_of("alice", concurrency=2), key_of("bob"))
    first, _second = admission.admit(token_of("alice"), MODEL), admission.admit(token_of("alice"), MODEL)
    refusal = refusal_of(admission, token_of("alice"))
    assert refusal.reason is Reason.KEY_CONCURRENCY
    assert refusal.retry_after_s == 1
    admission.admit(token_of("bob"), MODEL)
    first.release()
    first.release()
    admission.admit(token_of("alice"), MODEL)
    assert refusal_of(admission, token_of("alice")).reason is Reason.KEY_CONCURRENCY


def test_whoever_has_used_a_minutes_tokens_waits_as_long_as_told(clock):
    _, admission = limited(clock, tokens_per_minute=60)
    admission.admit(token_of("alice"), MODEL).charge(70)
    refusal = refusal_of(admission, token_of("alice"))
    assert refusal.reason is Reason.KEY_TOKENS
    assert refusal.retry_after_s == pytest.approx(11.0)
    admission.admit(token_of("bob"), MODEL).charge(10**6)
    clock.now_s += refusal.retry_after_s
    admission.admit(token_of("alice"), MODEL)


def test_a_limit_that_is_changed_holds_for_what_was_used_before(clock):
    keys, admission = limited(clock, tokens_per_minute=60)
    admission.admit(token_of("alice"), MODEL).charge(70)
    keys.keys = (key_of("alice", tokens_per_minute=600), key_of("bob"))
    admission.admit(token_of("alice"), MODEL)
    keys.keys = (key_of("alice"), key_of("bob"))
    admission.admit(token_of("alice"), MODEL).charge(10**6)
    admission.admit(token_of("alice"), MODEL)


def test_a_key_that_is_revoked_is_refused_at_once_and_its_running_request_can_still_end():
    keys = FakeKeys(key_of("alice", concurrency=1, tokens_per_minute=10), key_of("bob"))
    admission = Admission(keys, mode="auto", known={}.get)
    running = admission.admit(token_of("alice"), MODEL)
    keys.keys = (key_of("alice", revoked_unix_s=1.0), key_of("bob"))
    assert refusal_of(admission, token_of("alice")).reason is Reason.KEY_INVALID
    running.charge(5)
    running.release()
    admission.admit(token_of("bob"), MODEL)


def test_each_refusal_for_a_key_is_told_once_and_other_refusals_are_not():
    told = []
    keys = (
        key_of("one", models=(MODEL,), concurrency=1),
        key_of("expired", expires_unix_s=1.0),
        key_of("spent", tokens_per_minute=1),
    )
    admission = admission_of(*keys, known={MODEL: MODEL, "other": "other"}, refused=told.append)
    admission.admit(token_of("spent"), MODEL).charge(1000)
    admission.admit(token_of("one"), MODEL)
    for name, model in (("one", MODEL), ("one", "other"), ("expired", MODEL), ("spent", MODEL), ("guess", MODEL)):
        refusal_of(admission, token_of(name), model)
    refusal_of(admission, None)
    assert told == [
        Reason.KEY_CONCURRENCY,
        Reason.KEY_SCOPE,
        Reason.KEY_EXPIRED,
        Reason.KEY_TOKENS,
        Reason.KEY_INVALID,
        Reason.KEY_MISSING,
    ]


def test_what_is_about_every_model_is_for_keys_of_every_model():
    admission = admission_of(key_of("all"), key_of("some", models=("tiny-*",)))
    admission.check_sees_all(admission.authenticate(token_of("all")))
    with pytest.raises(SollolError, match=r"KEY_SCOPE.*tiny-\*"):
        admission.check_sees_all(admission.authenticate(token_of("some")))
    admission_of().check_sees_all(admission_of().authenticate(None))
