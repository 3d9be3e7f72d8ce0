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


EXPERIMENT = Column("experiment", "VARCHAR", "name of the experiment", "entry.experiment")
LINEAGE = (
    Column("fingerprint", "VARCHAR", "the artifact that holds the row", "entry.fingerprint"),
    Column("run_id", "VARCHAR", "Dagster run that last materialized it", "entry.run_id"),
)
_PAIR_ID = Column("pair_id", "VARCHAR", "first 16 hex digits of sha256(chosen_id + rejected_id)")
_PROMPT_ID = Column("prompt_id", "VARCHAR", "first 16 hex digits of sha256(prompt)")
_RESPONSE_ID = Column("response_id", "VARCHAR", "first 16 hex digits of sha256(prompt + NUL + response)")
_POLICY = Column("policy", "VARCHAR", "'sft' or 'modpo'")
_W = Column("w", "DOUBLE", "weight of the preference, in (0, 1]; null for SFT")
_TOKENS = Column("response_tokens", "INTEGER", "tokens of the response, with its end-of-text token")
_FINISH = Column(
    "finish_reason", "VARCHAR", "'eos': the model ended the response; 'length': the limit on new tokens did"
)
_MARGIN_LOG_RATIO = "log p_adapter - log p_sft of the response, in nats; null without a margin adapter"
_LOG_RATIO_TO_SFT = "log p_policy - log p_sft of the response, in nats"
_SIDES = ("chosen", "rejected")

_PAIR_COLUMNS = (
    EXPERIMENT,
    _PAIR_ID,
    _PROMPT_ID,
    Column("split", "VARCHAR", "'train', 'selection' (chooses checkpoints) or 'validation'"),
    Column("prompt", "VARCHAR", "prompt, uncut"),
    *(Column(f"{side}_id", "VARCHAR", _RESPONSE_ID.comment) for side in _SIDES),
    Column("chosen", "VARCHAR", "the response rated higher, uncut"),
    Column("rejected", "VARCHAR", "the response rated lower, uncut"),
    *(
        Column(f"{side}_{name}", "TINYINT", f"{name} of the {side} response, {scale}")
        for name, scale in (*((name, "0 to 4") for name in ATTRIBUTES), (OVERALL, "0 to 20, the sum of the five"))
        for side in _SIDES
    ),
    *LINEAGE,
)

DECLARED = (
    *(
        Table(
            f"{attribute}_pairs",
            f"One row per pair of responses to one prompt that differ in the {attribute} attribute",
            (f"{attribute}_pairs",),
            ("experiment", "pair_id"),
            _PAIR_COLUMNS,
        )
        for attribute in ("preference", "margin")
    ),
    Table(
        "reference_log_probs",
        "One row per unique prompt and response of the pairs: its log-probability under the SFT model",
        ("reference_log_probs",),
        ("experiment", "prompt_id", "response_id"),
        (
            EXPERIMENT,
            _PROMPT_ID,
            _RESPONSE_ID,
            Column("log_prob", "DOUBLE", "log p_sft(response | prompt), the sum over its tokens, in nats"),
            Column("response_tokens", "INTEGER", "tokens that log_prob sums over"),
            Column("truncated", "BOOLEAN", "whether prompt or response was cut"),
            *LINEAGE,
        ),
    ),
    Table(
        "margin_rewards",
        "One row per unique prompt and response of the preference pairs: its margin, unscaled",
        ("margin_rewards",),
        ("experiment", "prompt_id", "response_id"),
        (
            EXPERIMENT,
            _PROMPT_ID,
            _RESPONSE_ID,
            Column("log_ratio", "DOUBLE", _MARGIN_LOG_RATIO),
            Column("response_tokens", "INTEGER", "tokens of the uncut response"),
            *LINEAGE,
        ),
    ),
    Table(
        "margin_validation",
        "One row per validation pair of the margin attribute: the margin adapter's log-ratios of both responses",
        ("margin_adapter_quality",),
        ("experiment", "pair_id"),
        (
            EXPERIMENT,
            _PAIR_ID,
            _PROMPT_ID,
            Column("rating_gap", "INTEGER", "margin attribute of the chosen minus that of the rejected response"),
            *(Column(f"{side}_tokens", "INTEGER", f"tokens that {side}_log_ratio sums over") for side in _SIDES),
            *(
                Column(f"{side}_log_ratio", "DOUBLE", f"log p_adapter - log p_sft of the {side} response, in nats")
                for side in _SIDES
            ),
            *LINEAGE,
        ),
    ),
    Table(
        "generations",
        "One row per policy and evaluation prompt: the response",
        ("sft_generations", "generations"),
        ("experiment", "policy", "w", "prompt_id"),
        (
            EXPERIMENT,
            _POLICY,
            _W,
            _PROMPT_ID,
            Column("prompt", "VARCHAR", "prompt, uncut"),
            Column("response", "VARCHAR", "generated response"),
            _TOKENS,
            _FINISH,
            Column("prompt_truncated", "BOOLEAN", "whether the prompt was cut"),
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
            _POLICY,
            _W,
            _PROMPT_ID,
            Column(
                "margin_reward",
                "DOUBLE",
                "r_m, without the role's sign (docs/how-it-works.md)",
            ),
            Column("margin_log_ratio", "DOUBLE", _MARGIN_LOG_RATIO),
            Column("log_ratio_to_sft", "DOUBLE", _LOG_RATIO_TO_SFT),
            _TOKENS,
            Column("response_words", "INTEGER", "words, separated by white space"),
            _FINISH,
            *(
                Column(name, "DOUBLE", f"{name} by the rater, on its scale; null without a rater")
                for name in ATTRIBUTES
            ),
            *LINEAGE,
        ),
    ),
    Table(
        "kl_to_sft",
        "One row per policy, evaluation prompt and sample, drawn at temperature 1; the mean of log_ratio estimates the "
        "policy's KL divergence to the SFT model",
        ("kl_to_sft",),
        ("experiment", "policy", "w", "prompt_id", "sample"),
        (
            EXPERIMENT,
            Column("policy", "VARCHAR", "'modpo'"),
            _W,
            _PROMPT_ID,
            Column("sample", "INTEGER", "sample of this prompt, from 0"),
            Column("log_ratio", "DOUBLE", _LOG_RATIO_TO_SFT),
            Column("response", "VARCHAR", "sampled response"),
            _TOKENS,
            _FINISH,
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
            _POLICY,
            _W,
            Column(
                "measure",
                "VARCHAR",
                "a column of scores; overall (sum of the ratings); margin (margin_reward with the role's sign: more is "
                "better); kl_to_sft (nats); repetition (share of repeated word 4-grams); capped, empty, "
                "prompt_truncated (shares of the responses)",
            ),
            Column("n", "INTEGER", "evaluation prompts"),
            Column("mean", "DOUBLE", "mean over the prompts"),
            Column("sd", "DOUBLE", "standard deviation over the prompts"),
            Column("ci_low", "DOUBLE", "lower end of the mean's 95% interval"),
            Column("ci_high", "DOUBLE", "upper end of the mean's 95% interval"),
            Column("delta", "DOUBLE", "mean difference to SFT on the same prompts; null for SFT"),
            Column("delta_low", "DOUBLE", "lower end of the difference's 95% interval, for this weight alone"),
            Column("delta_high", "DOUBLE", "upper end of that interval; the report's hold for all weights at once"),
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
        Column("partition", "VARCHAR", "weight; null for an asset without weights", "entry.partition"),
        Column("fingerprint", "VARCHAR", "hash of all that determines the artifact", "entry.fingerprint"),
        Column("path", "VARCHAR", "folder of the artifact", "entry.path"),
        Column("run_id", "VARCHAR", "Dagster run that materialized it", "entry.run_id"),
        Column("materialized_at", "TIMESTAMP", "when it was materialized, UTC", "entry.materialized_at"),
        Column("reused", "BOOLEAN", "whether the artifact was there already", "entry.reused"),
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
