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
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"Expected a readable CSV file, got {path} ({error}). Save it as CSV in UTF-8.") from error
    if not {"file_name", *required} <= set(columns):
        raise ValueError(
            f"Expected the columns {', '.join(('file_name', *required))} in {path}, got {columns}. Rename one, and"
            " separate columns by commas."
        )
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise ValueError(f"Expected each column once in {path}, got {repeated[0]!r} again. Rename or delete one.")
    if not rows:
        raise ValueError(f"Expected a row for each cell in {path}, got none. Add them, or delete the file.")
    for line, row in rows:
        if "" in row and "" not in columns or None in row.values():
            raise ValueError(
                f"Expected {len(columns)} columns in {path}, line {line}, got another number. Quote commas in names."
            )
        if not row["file_name"].strip():
            raise ValueError(f"Expected a file_name in {path}, line {line}, got none. Fill it in, or delete the row.")
    return rows
