"""Arrow schemas of the tables that roles exchange, and of the experience log.

A shard is one Arrow table with one row per sample. Each stage adds columns:

    rollout engine   ROLLOUT      tokens, text, the engine's log-probs, version
    scorers          LOGPROBS, VALUES, REWARDS   joined to the rollout on `row`
    recorder         EXPERIENCE   all of the above plus token rewards, advantages, returns

STATES are not part of the log: the choice of what people judge reads them.

Per-token lists cover only the *response* tokens, including EOS if it was sampled. All lists of a row have
`len(response_tokens)` items, so lengths locate tokens and pad ids have no meaning. `learn` marks the tokens to learn
from. Tokens that an environment or a tool wrote are not marked; losses, advantages, lengths and statistics ignore them.

A sample is one segment, which begins with `prompt_tokens`, unless a conversation was rewritten while it was sampled:
then `starts` says where in the response further segments begin, each with the prompt that the model read there. A token
sees only its own segment.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_TOKENS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())


ROLLOUT = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),  # number of the sample in its step
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),  # 0 .. samples_per_prompt - 1; GREEDY: a baseline
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),  # as the user wrote it, before the chat template
        pa.field("response_text", pa.string(), nullable=False),  # without the tokens that end it
        pa.field("prompt_tokens", _TOKENS, nullable=False),  # after the chat template
        pa.field("response_tokens", _TOKENS, nullable=False),
        pa.field("learn", pa.list_(pa.bool_()), nullable=False),  # whether to learn from the token
        pa.field("starts", _TOKENS, nullable=False),  # where in the response a further segment begins
        pa.field("engine_logprobs", _FLOATS, nullable=False),  # at the sampling temperature
        pa.field("finish_reason", pa.string(), nullable=False),  # "stop" (EOS sampled) or "length"
        pa.field("version", pa.int32(), nullable=False),  # version of the weights that sampled it
        pa.field("meta", pa.string(), nullable=False),  # the prompt's other fields and raw_response, JSON
    ]
)

LOGPROBS = pa.schema([pa.field("row", pa.int32(), nullable=False), pa.field("logprobs", _FLOATS, nullable=False)])
VALUES = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("values", _FLOATS, nullable=False),  # V(s_t) in the state in which response token t is chosen
        pa.field("bootstrap_value", pa.float32(), nullable=False),  # V after the last response token
    ]
)
REWARDS = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("reward", pa.float32()),  # null: scoring failed, see reward_error
        pa.field("reward_parts", pa.map_(pa.string(), pa.float32()), nullable=False),
        pa.field("reward_error", pa.string()),
        pa.field("tokens_cut", pa.int32(), nullable=False),  # tokens cut from the start of the scored transcript
    ]
)
STATES = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("heads", _FLOATS),  # the score by each head, before normalisation; null: see error
        pa.field("state", _FLOATS),  # of the trunk at the last token, which the heads read
        pa.field("error", pa.string()),
    ]
)

EXPERIENCE = pa.schema(
    [
        *ROLLOUT,
        pa.field("old_logprobs", _FLOATS, nullable=False),  # of the learner, before it learns this step
        pa.field("ref_logprobs", _FLOATS, nullable=False),
        pa.field("values", _FLOATS, nullable=False),  # without a critic: the baseline of the prompt's samples
        pa.field("reward", pa.float32(), nullable=False),  # sequence reward, before the KL penalty
        pa.field("reward_parts", pa.map_(pa.string(), pa.float32()), nullable=False),
        pa.field("token_rewards", _FLOATS, nullable=False),  # with KL penalty, reward on the last token
        pa.field("advantages", _FLOATS, nullable=False),  # before whitening (moments: manifest)
        pa.field("returns", _FLOATS, nullable=False),
    ]
)


def with_all_columns(table: pa.Table) -> pa.Table:
    """Adds columns to an EXPERIENCE table from before they existed: all tokens are learned, in one segment per row."""
    if "learn" not in table.column_names:
        tokens = table["response_tokens"].combine_chunks()
        offsets = pa.array(np.concatenate([[0], np.cumsum(tokens.value_lengths().to_numpy())]), pa.int32())
        learn = pa.ListArray.from_arrays(offsets, pa.array(np.ones(offsets[-1].as_py(), np.bool_)))
        table = table.add_column(EXPERIENCE.get_field_index("learn"), EXPERIENCE.field("learn"), learn)
    if "starts" not in table.column_names:
        starts = pa.array([[]] * table.num_rows, _TOKENS)
        table = table.add_column(EXPERIENCE.get_field_index("starts"), EXPERIENCE.field("starts"), starts)
    return table
