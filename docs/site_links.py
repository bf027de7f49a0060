"""A hook of MkDocs: links to files of the repository that are no pages of the site become their paths."""

import re
from pathlib import Path


_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """``[`HAGAN`](../src/diffusers_byoc/baselines/ha_gan.py)`` -> ``[`HAGAN`]`` with its path in brackets.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    folder = Path(page.file.abs_src_path).parent
    repository = Path(config.config_file_path).parent.resolve()

    def plain(match: re.Match) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(repository / "docs"):
            return match[0]
        if not target.exists():
            raise FileNotFoundError(f"Expected the file {match[2]}, which {page.file.src_path} links to, got none.")
        return f"{match[1]} (`{target.relative_to(repository)}`)"

    return _LINK.sub(plain, markdown)
