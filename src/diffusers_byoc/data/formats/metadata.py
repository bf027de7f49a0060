"""Tables that say what each file is: CSV with a header, a column `file_name` and a row for each file."""

import csv
from pathlib import Path


def read_metadata(path: Path, *required: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of a metadata table.

    Args:
        path: a CSV file in UTF-8, with or without byte-order mark, with any line ends.
        required: columns that must be there, besides `file_name`.

    Returns:
        For each row the number of its line and what stands in its columns, `file_name` among them.

    Raises:
        ValueError: if it is no such table, or a row has another number of columns or no file name. The message names
            the file and the line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: Excel writes a byte-order mark
            reader = csv.DictReader(file, restkey="", strict=True)
            columns = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as err:
        raise ValueError(f"{path}: not a readable CSV file ({err}); save it as CSV in UTF-8") from err
    for column in ("file_name", *required):
        if column not in columns:
            raise ValueError(
                f"{path}: expected a column {column}, got the columns {columns}; rename one, and separate columns by"
                " commas"
            )
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise ValueError(f"{path}: the column {repeated[0]!r} stands there more than once; rename or delete one")
    if not rows:
        raise ValueError(f"{path}: expected a row for each cell, got none; add them, or delete the file")
    for line, row in rows:
        if "" in row and "" not in columns or None in row.values():
            raise ValueError(
                f"{path}, line {line}: expected {len(columns)} columns, got another number; quote commas in names"
            )
        if not row["file_name"].strip():
            raise ValueError(f"{path}, line {line}: file_name is empty; fill it in, or delete the row")
    return rows
