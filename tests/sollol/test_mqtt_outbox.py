from sollol.mqtt_outbox import Outbox, Publication


def word(topic, payload):
    return Publication(topic=topic, payload=payload, retain=True)


def event(payload):
    return Publication(topic="e", payload=payload)


def all_of(outbox):
    taken = []
    while (publication := outbox.take()) is not None:
        taken.append((publication.topic, publication.payload))
    return taken


def test_of_several_words_on_a_topic_only_the_newest_leaves():
    outbox = Outbox()
    for publication in (word("a", b"1"), event(b"x"), word("b", b"1"), word("a", b"2")):
        outbox.put(publication)
    assert all_of(outbox) == [("a", b"2"), ("b", b"1"), ("e", b"x")]
    assert outbox.take() is None


def test_after_a_reconnect_every_retained_word_is_due_again_and_no_event():
    outbox = Outbox()
    for publication in (word("a", b"1"), event(b"x"), word("b", b"1"), word("b", b"")):
        outbox.put(publication)
    assert all_of(outbox) == [("a", b"1"), ("b", b""), ("e", b"x")]
    outbox.restore()
    assert all_of(outbox) == [("a", b"1")], "what was removed stays so"


def test_what_could_not_be_sent_is_due_again_unless_there_is_a_newer_word():
    outbox = Outbox()
    for publication in (word("a", b"1"), word("b", b""), event(b"x"), event(b"y")):
        outbox.put(publication)
    first, removal, lost = outbox.take(), outbox.take(), outbox.take()
    outbox.put(word("a", b"2"))
    for publication in (first, removal, lost):
        outbox.put_back(publication)
    assert sorted(all_of(outbox)) == [("a", b"2"), ("b", b""), ("e", b"x"), ("e", b"y")]


def test_it_is_bounded_and_the_oldest_goes_first():
    outbox = Outbox(topics_kept=2, events_kept=2)
    for number in range(4):
        outbox.put(word(f"t{number}", b"1"))
        outbox.put(event(b"%d" % number))
    assert all_of(outbox) == [("t2", b"1"), ("t3", b"1"), ("e", b"2"), ("e", b"3")]
    assert outbox.dropped == 4
