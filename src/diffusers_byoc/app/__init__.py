"""A page to click, made with Gradio: ``pip install "diffusers_byoc[app]"``, then ``byoc-app``."""

from .models import Limits, Model, Models, Request
from .page import make_page


__all__ = ["Limits", "Model", "Models", "Request", "make_page"]
