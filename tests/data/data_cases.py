"""A small log whose encoding can be checked by eye, shared by the tests of this folder."""

import pyarrow as pa

from mldcn.data.reading import RawBlock, table_blocks
from mldcn.schema import Schema


def schema(features, labels=({"name": "click"},), **others) -> Schema:
    import json

    return Schema.model_validate_json(
        json.dumps({"features": list(features), "labels": list(labels), **others})
    )


def block(**columns) -> RawBlock:
    """A block of a file called ``log.csv`` whose first row is number 11."""
    table = next(table_blocks(pa.table(columns), 1 << 20)).table
    return RawBlock(table, "log.csv", 11)
