"""Parquet tables of others, whose few bytes may claim any number of equal rows, or of equal texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych_common.extras import import_extra
from triptych_common.storage.files import LONGEST_NAME, read_bytes

if TYPE_CHECKING:
    import pyarrow

ROWS = 1 << 20  # of a Parquet file of any size; a larger one has a byte for each


def parquet(path: Path, *, remedy: str, extra: str, name: str | None = None) -> "pyarrow.Table":
    """The columns of a Parquet file that hold numbers and, where given, the column `name`, of names of files.

    remedy: what to do about a damaged file, the end of the error message. extra: the pip requirement that provides pyarrow.
    Raises ValueError for a damaged file, more rows than it has bytes, or longer names than files have, ImportError without
    pyarrow.
    """
    needed = f"tables in .parquet need a package: pip install '{extra}', or use .csv"
    pa: Any = import_extra("pyarrow", needed)
    pc: Any = import_extra("pyarrow.compute", needed)
    pq: Any = import_extra("pyarrow.parquet", needed)
    content = read_bytes(path)
    try:
        with pq.ParquetFile(pa.BufferReader(content), read_dictionary=[name] if name else None) as file:
            rows, columns = file.metadata.num_rows, file.schema_arrow
            if rows > max(ROWS, len(content)):
                raise ValueError(f"{path}: {rows:,} rows in {len(content):,} bytes; {remedy}")
            table = file.read([each.name for each in columns if each.name == name or pa.types.is_primitive(each.type)])
        texts = table.column(name).combine_chunks() if name in table.column_names else pa.array([])
        names = texts.dictionary if pa.types.is_dictionary(texts.type) else pa.array([], pa.string())
        if (longest := pc.max(pc.binary_length(names)).as_py() or 0) > LONGEST_NAME:
            raise ValueError(f"{path}: a {name}'s name of {longest:,} bytes, expected a folder's; {remedy}")
        return table
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(f"{path}: no Parquet file, or a damaged one; {remedy}") from error
