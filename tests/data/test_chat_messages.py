"""The messages of a chat as data and requests have them."""

from para_jax.data.chat_messages import checked_messages, split_conversation

USER = {"role": "user", "content": "where is my parcel?"}


def test_a_conversation_with_k_assistant_turns_is_k_examples():
    first, second = ({"role": "assistant", "content": c} for c in ("one", "two"))
    assert split_conversation([USER, first, USER, second]) == [([USER], first), ([USER, first, USER], second)]
    assert split_conversation([USER]) == []


def test_no_calls_are_as_no_field():
    """Responses of servers have "tool_calls": [], and templates may ask whether the field is there."""
    message = {"role": "assistant", "content": "Hello"}
    for empty in ([], None, {}):
        assert checked_messages("messages", [message | {"tool_calls": empty, "function_call": empty}]) == [message]
