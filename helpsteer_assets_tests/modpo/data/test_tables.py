from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer_assets.modpo.data.tables import query, write_parquet

SCHEMA = pa.schema([pa.field("text", pa.string(), nullable=False), pa.field("number", pa.int8(), nullable=False)])


def rows(start: int, stop: int) -> pa.RecordBatch:
    """In another order, and of wider types, than SCHEMA says, as a query gives them."""
    numbers = list(range(start, stop))
    return pa.RecordBatch.from_pydict(
        {"number": pa.array([n % 100 for n in numbers], pa.int64()), "text": [str(n) for n in numbers]}
    )


class TestQuery:
    @pytest.mark.parametrize("name", ["a.parquet", "it's [0]?*.parquet", "w=1/a.parquet"])
    def test_reads_files_and_tables(self, tmp_path: Path, name: str) -> None:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"n": [1, 2, 3]}), file)
        joined = query(
            "SELECT * FROM numbers JOIN words USING (n) WHERE n > $least ORDER BY n",
            {"least": 1},
            numbers=file,
            words=pa.table({"n": [3, 2, 1], "word": ["three", "two", "one"]}),
        )
        assert joined.to_pylist() == [{"n": 2, "word": "two"}, {"n": 3, "word": "three"}]


class TestWriteParquet:
    @settings(deadline=None)
    @given(sizes=st.lists(st.integers(0, 9), max_size=9), group=st.integers(1, 10))
    def test_row_groups_are_of_one_size_whatever_the_batches_are(
        self, tmp_path_factory: pytest.TempPathFactory, sizes: list[int], group: int
    ) -> None:
        file = tmp_path_factory.getbasetemp() / "batches.parquet"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("helpsteer_assets.modpo.data.tables.ROW_GROUP_ROWS", group)
            bounds = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
            write_parquet((rows(*pair) for pair in pairwise(bounds)), SCHEMA, file)
        written = pq.read_table(file)
        assert written.schema == SCHEMA
        assert written["text"].to_pylist() == [str(n) for n in range(sum(sizes))]
        assert written["number"].to_pylist() == [n % 100 for n in range(sum(sizes))]
        metadata = pq.read_metadata(file)
        counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        assert counts[:-1] == [group] * len(counts[:-1])
        assert all(0 < count <= group for count in counts)
