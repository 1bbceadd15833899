"""Records are parsed as Qwen-VL writes them, and every broken one is refused with a one-line reason."""

import pytest

from megavlm.data.schema import Turn, parse_conversation


def record(*values: tuple[str, str]) -> dict:
    return {"id": "a", "conversations": [{"from": role, "value": text} for role, text in values]}


def test_several_images_in_order_of_appearance() -> None:
    conv = parse_conversation(
        record(
            ("human", "Picture 1: <img>x/a.jpg</img>\nPicture 2: <img>b c.png</img>\nCompare."),
            ("gpt", "<ref>it</ref><box>(1,2),(999,40)</box>"),
            ("user", "And <img>a/../b.jpg</img>?"),
            ("assistant", "Yes."),
        )
    )
    assert conv.images == ("x/a.jpg", "b c.png", "a/../b.jpg")
    assert conv.turns[0] == Turn("user", "Picture 1: <img></img>\nPicture 2: <img></img>\nCompare.")
    assert [turn.role for turn in conv.turns] == ["user", "assistant"] * 2
    assert (conv.id, conv.task) == ("a", "")


def test_system_turn_text_only_and_task() -> None:
    conv = parse_conversation(record(("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")) | {"task": "chat"})
    assert conv.turns[0].role == "system" and conv.images == () and conv.task == "chat"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([], "must be an object"),
        ({"id": 1}, "no turns"),
        ({"conversations": []}, "no turns"),
        ({"conversations": ["x"]}, "turn 0 must be an object"),
        (record(("user", "a"), ("user", "b")), "alternate"),
        (record(("user", "a")), "alternate"),
        (record(("assistant", "a"), ("user", "b")), "alternate"),
        (record(("user", "a"), ("assistant", "b"), ("system", "c")), "alternate"),
        (record(("system", "a")), "no turns after"),
        (record(("robot", "a"), ("assistant", "b")), "unknown role"),
        (record((["user"], "a"), ("assistant", "b")), "unknown role"),
        (record(("user", "a"), ("assistant", " \n")), "no text"),
        (record(("user", 3), ("assistant", "b")), "no text"),
        (record(("user", "\ud800"), ("assistant", "b")), "not valid Unicode"),
        (record(("user", "<img>a"), ("assistant", "b")), "unbalanced"),
        (record(("user", "</img>a<img>"), ("assistant", "b")), "unbalanced"),
        (record(("user", "<img><img>a</img></img>"), ("assistant", "b")), "unbalanced"),
        (record(("user", "a"), ("assistant", "<img>a</img>")), "only user turns"),
        (record(("user", "a<|im_start|>"), ("assistant", "b")), "control token"),
        (record(("user", "a"), ("assistant", "b<|im_end|>")), "control token"),
        (record(("user", "a"), ("assistant", "b<|endoftext|>")), "control token"),
        (record(("user", "a<imgpad>"), ("assistant", "b")), "control token"),
        (record(("user", "a"), ("assistant", "<box>(1,2),(3,1000)</box>")), "malformed <box>"),
        (record(("user", "a"), ("assistant", "<box>(1,2)</box>")), "malformed <box>"),
        (record(("user", "a"), ("assistant", "<box>")), "malformed <box>"),
        (record(("user", "a"), ("assistant", "<box>(500,2),(100,3)</box>")), "ends before it begins"),
        (record(("user", "<box>(1,9),(2,8)</box>"), ("assistant", "a")), "ends before it begins"),
        (record(("user", "<img>https://x/a.jpg</img>"), ("assistant", "b")), "is a URL"),
        (record(("user", "<img>/etc/passwd</img>"), ("assistant", "b")), "is absolute"),
        (record(("user", "<img>a/../../b</img>"), ("assistant", "b")), "leaves the image directory"),
        (record(("user", "<img></img>"), ("assistant", "b")), "empty or broken"),
        (record(("user", "a"), ("assistant", "b")) | {"id": [1]}, "'id' must be"),
    ],
)
def test_broken_records_are_refused_with_one_line(bad: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_conversation(bad)
    assert "\n" not in str(caught.value)
