"""The page to click, as a Space of Hugging Face: what `byoc-app` does, with the pipelines in pretrained/ beside it."""

from diffusers_byoc.commands.app import main


if __name__ == "__main__":
    main()
