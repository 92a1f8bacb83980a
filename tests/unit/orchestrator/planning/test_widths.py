"""Over how many workers vLLM can divide a model."""

from __future__ import annotations

from orchestrator.planning.widths import Divided

QWEN_7B = Divided(28, 4, (("intermediate_size", 18944),), 152064)


def test_heads_divide_and_key_value_heads_divide_or_are_copied() -> None:
    assert QWEN_7B.widths == [1, 2, 4]
    assert list(QWEN_7B.misfits(8)) == ["28 attention heads"]
    assert list(QWEN_7B.misfits(7)) == [
        "4 key-value heads (nor are they a divisor of it)",
        "intermediate_size=18944",
        "152064 rows of the embedding (a vocabulary of 152064, padded)",
    ]


def test_one_key_value_head_is_copied_to_any_number_of_workers() -> None:
    assert Divided(32, 1, (), 64).widths == [1, 2, 4, 8, 16, 32]


def test_heads_that_share_one_latent_state_need_no_key_value_heads() -> None:
    assert Divided(6, None, (), 64 * 3).widths == [1, 2, 3, 6]


def test_a_vocabulary_counts_as_it_is_padded() -> None:
    assert Divided(3, 3, (), 65).widths == [1]
    assert Divided(3, 3, (), 129).widths == [1, 3]
