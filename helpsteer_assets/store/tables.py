"""The published tables: columns, types and units."""

from collections.abc import Iterator
from dataclasses import dataclass

from helpsteer_assets.modpo.data.attributes import ATTRIBUTES, OVERALL


@dataclass(frozen=True)
class Column:
    """A column of a published table."""

    name: str
    type: str
    """DuckDB type."""
    comment: str
    """Meaning and unit; published as COMMENT ON COLUMN."""
    expression: str | None = None
    """SQL over `data` (a row of the Parquet file) and `entry` (the registry entry); by default `data`'s column of
    the same name."""

    @property
    def sql(self) -> str:
        """The column in a SELECT, with its name and type."""
        return f"CAST({self.expression or f'data.{identifier(self.name)}'} AS {self.type}) AS {identifier(self.name)}"


@dataclass(frozen=True)
class Table:
    """A published table."""

    name: str
    comment: str
    """Meaning of a row; published as COMMENT ON TABLE."""
    assets: tuple[str, ...]
    """The assets whose Parquet files fill it."""
    key: tuple[str, ...]
    """The columns that tell its rows apart."""
    columns: tuple[Column, ...]


EXPERIMENT = Column("experiment", "VARCHAR", "experiment that the row belongs to", "entry.experiment")


LINEAGE = (
    Column("fingerprint", "VARCHAR", "fingerprint of the artifact that holds the row", "entry.fingerprint"),
    Column("run_id", "VARCHAR", "Dagster run that last materialized the artifact", "entry.run_id"),
)


_W = "weight of the preference in the MODPO objective, in (0, 1]; null for the SFT policy"


_PAIR_ID = "first 16 hex digits of sha256(chosen_id + rejected_id)"


_PROMPT_ID = "first 16 hex digits of sha256(prompt)"


_RESPONSE_ID = "first 16 hex digits of sha256(prompt + NUL + response)"


_POLICY = "'sft' or 'modpo'"


_FINISH = "'eos' if the model ended the response, 'length' if the limit on new tokens did"


_TOKENS = "tokens of the response, its end-of-text token included"


def _pair_columns() -> tuple[Column, ...]:
    ratings = (
        Column(
            f"{side}_{attribute}",
            "TINYINT",
            f"{attribute} of the {side} response, "
            + ("0 to 20: the sum of the five" if attribute == OVERALL else "0 to 4"),
        )
        for attribute in (*ATTRIBUTES, OVERALL)
        for side in ("chosen", "rejected")
    )
    return (
        EXPERIMENT,
        Column("pair_id", "VARCHAR", _PAIR_ID),
        Column("prompt_id", "VARCHAR", _PROMPT_ID),
        Column("split", "VARCHAR", "'train', 'selection' (chooses checkpoints) or 'validation'"),
        Column("prompt", "VARCHAR", "prompt, uncut"),
        Column("chosen_id", "VARCHAR", f"response_id of the chosen response: {_RESPONSE_ID}"),
        Column("rejected_id", "VARCHAR", f"response_id of the rejected response: {_RESPONSE_ID}"),
        Column("chosen", "VARCHAR", "the response rated higher, uncut"),
        Column("rejected", "VARCHAR", "the response rated lower, uncut"),
        *ratings,
        *LINEAGE,
    )


DECLARED = (
    Table(
        "preference_pairs",
        "One row per pair of responses to one prompt that differ in the preference attribute",
        ("preference_pairs",),
        ("experiment", "pair_id"),
        _pair_columns(),
    ),
    Table(
        "margin_pairs",
        "One row per pair of responses to one prompt that differ in the margin attribute",
        ("margin_pairs",),
        ("experiment", "pair_id"),
        _pair_columns(),
    ),
    Table(
        "reference_log_probs",
        "One row per unique prompt and response of the pairs: log-probability under the SFT model",
        ("reference_log_probs",),
        ("experiment", "prompt_id", "response_id"),
        (
            EXPERIMENT,
            Column("prompt_id", "VARCHAR", _PROMPT_ID),
            Column("response_id", "VARCHAR", _RESPONSE_ID),
            Column("log_prob", "DOUBLE", "log p_sft(response | prompt), summed over the response's tokens, in nats"),
            Column("response_tokens", "INTEGER", "tokens of the response that log_prob sums over"),
            Column("truncated", "BOOLEAN", "whether prompt or response was cut to the length limits"),
            *LINEAGE,
        ),
    ),
    Table(
        "margin_rewards",
        "One row per unique prompt and response of the preference pairs: the margin, unscaled",
        ("margin_rewards",),
        ("experiment", "prompt_id", "response_id"),
        (
            EXPERIMENT,
            Column("prompt_id", "VARCHAR", _PROMPT_ID),
            Column("response_id", "VARCHAR", _RESPONSE_ID),
            Column(
                "log_ratio",
                "DOUBLE",
                "log p_adapter - log p_sft of the response, in nats, unscaled; null under the length penalty",
            ),
            Column("response_tokens", "INTEGER", "tokens of the uncut response"),
            *LINEAGE,
        ),
    ),
    Table(
        "margin_validation",
        "One row per validation pair of the margin attribute: what the margin adapter makes of both responses",
        ("margin_adapter_quality",),
        ("experiment", "pair_id"),
        (
            EXPERIMENT,
            Column("pair_id", "VARCHAR", _PAIR_ID),
            Column("prompt_id", "VARCHAR", _PROMPT_ID),
            Column(
                "rating_gap",
                "INTEGER",
                "the margin attribute's rating of the chosen minus that of the rejected response",
            ),
            *(
                Column(
                    f"{side}_tokens",
                    "INTEGER",
                    f"tokens of the {side} response that its log-ratio sums over, cut or not",
                )
                for side in ("chosen", "rejected")
            ),
            *(
                Column(
                    f"{side}_log_ratio",
                    "DOUBLE",
                    f"log p_adapter - log p_sft of the {side} response, in nats, unscaled",
                )
                for side in ("chosen", "rejected")
            ),
            *LINEAGE,
        ),
    ),
    Table(
        "generations",
        "One row per policy and evaluation prompt: the response it generated",
        ("sft_generations", "generations"),
        ("experiment", "policy", "w", "prompt_id"),
        (
            EXPERIMENT,
            Column("policy", "VARCHAR", _POLICY),
            Column("w", "DOUBLE", _W),
            Column("prompt_id", "VARCHAR", _PROMPT_ID),
            Column("prompt", "VARCHAR", "prompt, uncut"),
            Column("response", "VARCHAR", "generated response"),
            Column("response_tokens", "INTEGER", _TOKENS),
            Column("finish_reason", "VARCHAR", _FINISH),
            Column("prompt_truncated", "BOOLEAN", "whether the prompt was cut to the length limit"),
            *LINEAGE,
        ),
    ),
    Table(
        "scores",
        "One row per policy and evaluation prompt: the scores of its response",
        ("sft_scores", "scores"),
        ("experiment", "policy", "w", "prompt_id"),
        (
            EXPERIMENT,
            Column("policy", "VARCHAR", _POLICY),
            Column("w", "DOUBLE", _W),
            Column("prompt_id", "VARCHAR", _PROMPT_ID),
            Column(
                "margin_reward",
                "DOUBLE",
                "r_m before the role's sign, higher is more of what the adapter prefers: "
                "margin_beta * margin_log_ratio in nats, or -penalty * response_tokens",
            ),
            Column(
                "margin_log_ratio",
                "DOUBLE",
                "log p_adapter - log p_sft of the response, in nats, unscaled; null under the length penalty",
            ),
            Column("log_ratio_to_sft", "DOUBLE", "log p_policy - log p_sft of the response, in nats"),
            Column("response_tokens", "INTEGER", _TOKENS),
            Column("response_words", "INTEGER", "words of the response, separated by white space"),
            Column("finish_reason", "VARCHAR", _FINISH),
            *(
                Column(name, "DOUBLE", f"{name} by the configured rater, on its scale; null without a rater")
                for name in ATTRIBUTES
            ),
            *LINEAGE,
        ),
    ),
    Table(
        "kl_to_sft",
        "One row per policy, evaluation prompt and sample: a response drawn at temperature 1, unaltered; the "
        "mean of log_ratio estimates the policy's KL divergence to the SFT model",
        ("kl_to_sft",),
        ("experiment", "policy", "w", "prompt_id", "sample"),
        (
            EXPERIMENT,
            Column("policy", "VARCHAR", "'modpo': SFT's divergence from itself is 0"),
            Column("w", "DOUBLE", _W),
            Column("prompt_id", "VARCHAR", _PROMPT_ID),
            Column("sample", "INTEGER", "number of the sample of this prompt, from 0"),
            Column("log_ratio", "DOUBLE", "log p_policy - log p_sft of the response, in nats"),
            Column("response", "VARCHAR", "sampled response"),
            Column("response_tokens", "INTEGER", _TOKENS),
            Column("finish_reason", "VARCHAR", _FINISH),
            *LINEAGE,
        ),
    ),
    Table(
        "score_summary",
        "One row per policy and measure: mean over the evaluation prompts, with 95% bootstrap intervals",
        ("score_summary",),
        ("experiment", "policy", "w", "measure"),
        (
            EXPERIMENT,
            Column("policy", "VARCHAR", _POLICY),
            Column("w", "DOUBLE", _W),
            Column(
                "measure",
                "VARCHAR",
                "a column of scores; overall (sum of the ratings), margin (margin_reward with the role's sign, more is "
                "better), kl_to_sft (nats), repetition (share of repeated word 4-grams); or the share of responses "
                "that are capped or empty, or whose prompt was cut (prompt_truncated)",
            ),
            Column("n", "INTEGER", "evaluation prompts"),
            Column("mean", "DOUBLE", "mean, in the measure's unit"),
            Column("sd", "DOUBLE", "standard deviation over prompts, in the measure's unit"),
            Column("ci_low", "DOUBLE", "lower end of the mean's 95% interval"),
            Column("ci_high", "DOUBLE", "upper end of the mean's 95% interval"),
            Column("delta", "DOUBLE", "mean difference to the SFT policy on the same prompts; null for the SFT policy"),
            Column(
                "delta_low",
                "DOUBLE",
                "lower end of the difference's 95% interval for this weight alone; the report's hold for all weights",
            ),
            Column("delta_high", "DOUBLE", "upper end of the difference's 95% interval for this weight alone"),
            *LINEAGE,
        ),
    ),
)


MATERIALIZATIONS = Table(
    "materializations",
    "One row per experiment, asset and partition: its latest materialization",
    (),
    ("experiment", "asset", "partition"),
    (
        EXPERIMENT,
        Column("asset", "VARCHAR", "asset", "entry.asset"),
        Column(
            "partition", "VARCHAR", "weight as the partition key; null for an unpartitioned asset", "entry.partition"
        ),
        Column("fingerprint", "VARCHAR", "hash of all that determines the artifact", "entry.fingerprint"),
        Column("path", "VARCHAR", "folder of the artifact, with its manifest.json", "entry.path"),
        Column("run_id", "VARCHAR", "Dagster run that materialized it", "entry.run_id"),
        Column("materialized_at", "TIMESTAMP", "when it was materialized, UTC", "entry.materialized_at"),
        Column("reused", "BOOLEAN", "whether the artifact was found finished instead of computed", "entry.reused"),
    ),
)


TABLES: dict[str, Table] = {table.name: table for table in (*DECLARED, MATERIALIZATIONS)}
"""Every published table; each exists, if only empty, in every published file."""


def definition(table: Table) -> Iterator[str]:
    """The SQL statements that make the table and its comments."""
    name = identifier(table.name)
    yield f"CREATE TABLE {name} ({', '.join(f'{identifier(c.name)} {c.type}' for c in table.columns)})"
    yield f"COMMENT ON TABLE {name} IS {literal(table.comment)}"
    for column in table.columns:
        yield f"COMMENT ON COLUMN {name}.{identifier(column.name)} IS {literal(column.comment)}"


def identifier(name: str) -> str:
    """The name, quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """The text as a string of SQL."""
    return "'" + text.replace("'", "''") + "'"
