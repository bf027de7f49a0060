"""The page: what is on it, and what happens when it is clicked."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..data import prepare_channel
from ..optional import optional
from ..visualization import feature_distributions
from . import numbers
from .models import Limits, Model, Models, Request, check_request
from .pictures import cell_center, projection_pictures, slice_pictures
from .shown import Shown
from .uploads import ENDINGS, as_cell, read_upload


if TYPE_CHECKING:
    import gradio

MAX_CONDITIONS = 4
ANY = "any"  # the class of a cell that is made without one
CSS = ".gallery .grid-wrap { min-height: 0 !important; } .plane img { background: black; }"
_PLANES = ("XY", "XZ", "YZ")
_OPENING = """# Build Your Own Cell
Volumes of single cells, cell body green and nucleus magenta, made by latent diffusion. The pipelines that come with
the package were trained on phantoms, which are drawn by a formula: no microscopy."""


def make_page(models: Models, limits: Limits | None = None) -> "gradio.Blocks":
    """The page, not yet served.

    Args:
        models: the pipelines to choose from.
        limits: of one click; `None` for `Limits()`.

    Returns:
        What `launch(css=CSS)` serves.

    Raises:
        ImportError: if Gradio is not installed.
    """
    gr = optional("gradio", "app")
    limits = limits or Limits()
    said = functools.partial(_said, gr.Error)

    with gr.Blocks(title="Build Your Own Cell", analytics_enabled=False, delete_cache=(3600, 4 * 3600)) as page:
        # 1. what is on it
        gr.Markdown(_OPENING)
        shown, chosen, is_turned = gr.State(None), gr.State(0), gr.State(False)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                pipeline = gr.Dropdown(
                    [(Path(name).name if Path(name).is_dir() else name, name) for name in models.names],
                    value=models.names[0],
                    label="Pipeline" + (", or a name on the Hub" if models.is_open else ""),
                    allow_custom_value=models.is_open,
                )
                label = gr.Dropdown([], label="Phenotype", visible=False)
                conditions = [gr.Number(value=None, visible=False) for _ in range(MAX_CONDITIONS)]
                num_cells = gr.Slider(1, limits.num_cells, value=min(4, limits.num_cells), step=1, label="Cells")
                seed = gr.Number(0, precision=0, label="Seed")
                with gr.Accordion("Sampler", open=False):
                    scheduler = gr.Dropdown([], label="Scheduler")
                    steps = gr.Slider(1, 1000, value=25, step=1, label="Steps")
                    guidance = gr.Slider(0, 8, value=1, step=0.25, label="Guidance", visible=False)
                    texture = gr.Checkbox(True, label="Draw texture", visible=False)
                generate_button = gr.Button("Generate", variant="primary")
                with gr.Accordion("Morph", open=False, visible=False) as morph_part:
                    start = gr.Number(1, precision=0, label="From cell")
                    end = gr.Number(2, precision=0, label="To cell")
                    end_label = gr.Dropdown([], label="To phenotype", visible=False)
                    num_frames = gr.Slider(2, limits.num_cells, value=min(8, limits.num_cells), step=1, label="Frames")
                    morph_button = gr.Button("Morph")
                with gr.Accordion("A file of your own", open=False):
                    upload = gr.File(label=f"One cell or nucleus: {', '.join(ENDINGS)}", type="filepath")
                    look_button = gr.Button("Show this cell")
                    complete_button = gr.Button("Make cells for this nucleus", visible=False)
            with gr.Column(scale=5, min_width=320):
                status = gr.Markdown("Choose, then press **Generate**. Click a cell to see it below.")
                gallery = gr.Gallery(
                    show_label=False,
                    columns=4,
                    fit_columns=False,
                    height="auto",
                    allow_preview=False,
                    format="png",
                    elem_classes="gallery",
                )
                with gr.Tab("Slices"), gr.Row():
                    planes, sliders = [], []
                    for name, axis in zip(_PLANES, "zyx", strict=True):
                        with gr.Column(min_width=200):
                            planes.append(_picture(gr, name))
                            sliders.append(gr.Slider(0, 63, value=32, step=1, label=f"{axis}, voxels"))
                with gr.Tab("Projections"), gr.Row():
                    projections = [_picture(gr, f"maximum along {axis}", 200) for axis in "zyx"]
                with gr.Tab("Surface") as surface_tab:
                    model_3d = gr.Model3D(
                        label="Nucleus in its cell: drag to turn, scroll to zoom", clear_color=(0, 0, 0, 1), height=420
                    )
                with gr.Tab("Numbers"):
                    measurements = gr.Dataframe(
                        label="Median (5 % to 95 %)",
                        interactive=False,
                        wrap=True,
                        show_search="none",
                        column_widths=["31%", "19%", "25%", "25%"],  # whole on a phone
                    )
                    chart = gr.Plot(show_label=False)
                with gr.Tab("Files"):
                    files = gr.File(label="OME-TIFF", file_count="multiple", interactive=False)
                    program = gr.Code(label="The same cells in Python", language="python", interactive=False)

        choices = [pipeline, label, num_cells, seed, scheduler, steps, guidance, texture, *conditions]

        # 2. what a pipeline can do
        @said
        def offer(name):
            model = models.load(name)
            labels = [ANY] * model.can_lack_conditions + model.labels if model.labels else []
            fields = [_condition_field(gr, condition) for condition in model.conditions[:MAX_CONDITIONS]]
            fields += [gr.Number(value=None, visible=False)] * (MAX_CONDITIONS - len(fields))
            config = model.pipeline.config
            return {
                label: gr.Dropdown(labels, value=labels[-1] if labels else None, visible=bool(labels)),
                scheduler: gr.Dropdown(model.schedulers, value=model.schedulers[0]),
                steps: gr.Slider(
                    value=config.default_num_inference_steps, interactive=not config.get("num_distilled_steps")
                ),
                guidance: gr.Slider(value=config.get("default_guidance_scale", 1), visible=model.can_guide),
                texture: gr.Checkbox(True, visible=model.pipeline.texture_unet is not None),
                morph_part: gr.Accordion(visible=model.can_morph),
                end_label: gr.Dropdown(model.labels, value=None, visible=bool(labels)),
                complete_button: gr.Button(visible=model.can_complete),
                **dict(zip(conditions, fields, strict=True)),
            }

        def read(name, label, num_cells, seed, scheduler, steps, guidance, texture, *values) -> tuple[Model, Request]:
            model = models.load(name)
            names = [condition["name"] for condition in model.conditions]
            given = {name: value for name, value in zip(names, values, strict=False) if value is not None}
            request = Request(
                num_cells=int(num_cells or 0),
                label=None if label == ANY or not model.labels else label,
                scheduler=None if scheduler in (None, model.schedulers[0]) else scheduler,
                steps=None if steps is None else int(steps),
                use_texture=bool(texture),
                guidance_scale=guidance if model.can_guide else None,
                conditions=given,
                seed=-1 if seed is None else int(seed),
            )
            check_request(request, limits)
            if request.scheduler is not None and request.scheduler not in model.schedulers:
                raise ValueError(f"Expected a scheduler of this pipeline, got {scheduler}. Choose one of the list.")
            return model, request

        def show(model, volumes, titles, text, **made) -> dict:
            cells = Shown(volumes, titles, model.channel_names, model.voxel_size_um, pipeline=model.name, **made)
            thumbnails = [projection_pictures(volume, cells.voxel_size_um)[0] for volume in volumes]
            return {
                shown: cells,
                chosen: 0,
                gallery: list(zip(thumbnails, titles, strict=True)),
                files: cells.ome_tiffs(),
                program: model.python(cells.request) if cells.request else "",
                status: text,
            }

        # 3. cells
        @said
        def generate(progress=gr.Progress(track_tqdm=True), *values):  # noqa: B008
            model, request = read(*values)
            start_time = time.perf_counter()
            volumes = model.generate(request)
            titles = [f"cell {index + 1} seed {request.seed}" for index in range(len(volumes))]
            seconds = time.perf_counter() - start_time
            text = f"{_cells(volumes)}{_of(request.label)}, {request.steps} steps, in {seconds:.1f} s."
            return show(model, volumes, titles, text, label=request.label, request=request)

        @said
        def morph(cells, start, end, end_label, num_frames, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
            if cells is None or cells.request is None:
                raise ValueError("Expected generated cells to morph between, got none. Press Generate first.")
            request, count = cells.request, int(num_frames or 0)
            for number in (start, end):
                if number is None or not 1 <= number <= request.num_cells:
                    raise ValueError(f"Expected cells 1 to {request.num_cells}, got {number}. Choose two of these.")
            if not 2 <= count <= limits.num_cells:
                raise ValueError(f"Expected 2 to {limits.num_cells} frames, got {count}. Choose as many.")
            check_request(Request(count, steps=request.steps), limits)
            model = models.load(cells.pipeline)
            volumes = model.morph(request, int(start) - 1, int(end) - 1, end_label or None, count)
            titles = [f"frame {index + 1}" for index in range(count)]
            text = f"{count} frames from cell {start} to cell {end}{_of(end_label)}. Generate again to morph others."
            return show(model, volumes, titles, text, label=request.label if not end_label else None)

        @said
        def look(path, name):
            model = models.load(name)
            volume = as_cell(_read(path), model.pipeline.volume_processor)
            return show(model, volume[None], ["uploaded cell"], "The uploaded cell, prepared as for training.")

        @said
        def complete(path, progress=gr.Progress(track_tqdm=True), *values):  # noqa: B008
            model, request = read(*values)
            volumes = model.complete(request, prepare_channel(_read(path), model.pipeline.volume_processor, "nucleus"))
            titles = [f"cell {index + 1} for nucleus" for index in range(len(volumes))]
            text = f"{_cells(volumes)}{_of(request.label)} for the uploaded nucleus."
            return show(model, volumes, titles, text, label=request.label)

        # 4. the chosen cell
        def choose(event: gr.SelectData):
            return event.index

        def turn(cells, index):
            return True, None if cells is None else cells.glb(index)

        def view(cells, index, is_turned):
            volume, center = cells.volumes[index], cell_center(cells.volumes[index])
            moved = [
                gr.Slider(value=position, maximum=length - 1)
                for position, length in zip(center, volume.shape[1:], strict=True)
            ]
            return (
                *moved,
                *slice_pictures(volume, center, cells.voxel_size_um),
                *projection_pictures(volume, cells.voxel_size_um),
                # in a tab that nobody has opened, Gradio 6 never shows the model that it is given first
                cells.glb(index) if is_turned else gr.skip(),
            )

        def cut(cells, index, *position):
            if cells is None:
                return [None] * 3
            return slice_pictures(cells.volumes[index], position, cells.voxel_size_um)

        @said
        def measure(cells, index):
            if cells.measured is None:
                cells.measured = numbers.measure(cells.volumes, cells.voxel_size_um, cells.channel_names)
            phantoms = numbers.measure_phantoms(cells.label) if cells.label else None
            headings, rows = numbers.table(cells.measured, index, phantoms)
            known = numbers.distributions(cells.measured, phantoms)
            figure = feature_distributions(known, num_columns=3) if known["shown"] else None
            return gr.Dataframe(rows, headers=headings), figure

        # 5. what happens when it is clicked
        offered = [label, scheduler, steps, guidance, texture, morph_part, end_label, complete_button, *conditions]
        begin = {"concurrency_id": "pipeline", "api_name": "begin", "api_visibility": "private"}
        page.load(offer, pipeline, offered, **begin)
        pipeline.change(offer, pipeline, offered, concurrency_id="pipeline", api_name="offer")
        made = [shown, chosen, gallery, files, program, status]
        viewed = [*sliders, *planes, *projections, model_3d]
        for button, make, inputs in (
            (generate_button, generate, choices),
            (morph_button, morph, [shown, start, end, end_label, num_frames]),
            (look_button, look, [upload, pipeline]),
            (complete_button, complete, [upload, *choices]),
        ):
            making = button.click(
                make,
                inputs,
                made,
                concurrency_id="pipeline",
                show_progress_on=gallery,
                api_name=make.__name__,
            )
            making.success(view, [shown, chosen, is_turned], viewed, api_visibility="private").success(
                measure, [shown, chosen], [measurements, chart], api_visibility="private"
            )
        gallery.select(choose, None, chosen, api_visibility="private").success(
            view, [shown, chosen, is_turned], viewed, api_visibility="private"
        ).success(measure, [shown, chosen], [measurements, chart], api_visibility="private")
        surface_tab.select(turn, [shown, chosen], [is_turned, model_3d], api_visibility="private")
        for slider in sliders:
            slider.input(
                cut,
                [shown, chosen, *sliders],
                planes,
                show_progress="hidden",
                trigger_mode="always_last",
                api_visibility="private",
            )
    return page


def _said(error_class: type[Exception], function: Callable) -> Callable:
    """`function`, whose errors that say what to mend are told to the visitor."""

    @functools.wraps(function)
    def told(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ImportError, OSError, ValueError) as error:
            raise error_class(" ".join(str(error).split()), duration=None, print_exception=False) from error

    return told


def _picture(gr, name: str, min_width: int = 160):
    return gr.Image(
        label=name, format="png", interactive=False, min_width=min_width, buttons=["fullscreen"], elem_classes="plane"
    )


def _condition_field(gr, condition: dict):
    (low,), (high,), (mean,) = condition["min"], condition["max"], condition["mean"]
    return gr.Number(value=mean, label=f"{condition['name']} (trained on {low:g} to {high:g})", visible=True)


def _cells(volumes) -> str:
    return "1 cell" if len(volumes) == 1 else f"{len(volumes)} cells"


def _of(label: str | None) -> str:
    return f" of {label}" if label else ""


def _read(path: str | None):
    if path is None:
        raise ValueError("Expected a file, got none. Upload one first.")
    return read_upload(path)
