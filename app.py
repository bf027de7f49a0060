"""The page to click, from a clone or as a Space of Hugging Face: python app.py"""

import sys
from pathlib import Path

from diffusers_byoc.commands.app import main


if __name__ == "__main__":
    folders = sorted(Path(__file__).parent.glob("pretrained/*/model_index.json"))
    main(["--pretrained", *(str(path.parent) for path in folders), *sys.argv[1:]])
