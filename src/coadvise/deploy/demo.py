"""A page in the browser: drop a photograph, read what every teacher and token says of it, and why.

It needs Gradio (the extra `demo`). Only this module imports it.
"""

import os
import signal
import socket
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from coadvise.data.images import UnreadableImageError
from coadvise.deploy.predict import load_from_run
from coadvise.deploy.viewer import Viewer
from coadvise.errors import UserError
from coadvise.training.listener import Listener

NEEDED = "the demo needs Gradio; pip install 'coadvise[demo]'"
SHOWN = 5  # classes of each opinion
CSS = """  /* six opinions side by side, two on a phone; as many pictures in a row as fit, none cut off */
.opinions .confidence-set { font-size: 12px }
.opinions .output-class { font-size: 18px; padding: 28px 4px 8px }
.opinions .output-class, .opinions .text { overflow-wrap: anywhere }
.opinions .confidence { white-space: nowrap }
.pictures .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important }
.pictures .grid-container { grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)) !important }
"""


def serve(run: Path, part: str | None, host: str, port: int, listener: Listener) -> None:
    """Serves the page until Ctrl-C or SIGTERM. What is uploaded is kept until then, in a folder of its own.

    Args:
        run: Run directory.
        part: The student, such as "students/alone-0"; by default the first co-advised one.
        host: Address to listen at.

    Raises:
        UserError: As `load_from_run`; `part` is a teacher, the port is in use, the address is not this machine's, or
            Gradio is not installed.
    """
    student = load_from_run(run, part)
    if student.part.startswith("teachers/"):
        raise UserError(f"'{part}' is a teacher, which the demo shows beside each student; give a student of the run")
    with listening(host, port) as at, TemporaryDirectory(prefix="coadvise-demo-") as folder:
        if find_spec("gradio") is None:
            raise UserError(NEEDED)
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        import gradio
        import uvicorn
        from fastapi import FastAPI

        blocks = page(Viewer(student, run, listener), Path(folder))
        app = gradio.mount_gradio_app(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None), blocks, "/", footer_links=[], run_history=False,
            show_error=False, ssr_mode=False, css=CSS,
        )  # fmt: skip
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        listener.say(f"http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops it)")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[at])
        listener.say("stopped")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; who connects before the page is ready waits for it.

    Raises:
        UserError: The port is in use, or the address is not one of this machine.
    """
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        number = error.errno or 0
        why = os.strerror(number) if number > 0 else error.strerror  # below 0: the name has no address
        raise UserError(
            f"nothing can be served at {host}, port {port}: {why}; choose another --port or --host"
        ) from None


def page(viewer: Viewer, folder: Path) -> Any:
    """The page as Gradio's Blocks. Examples are written to `folder`."""
    import gradio as gr

    pictures = {"object_fit": "contain", "show_label": False, "interactive": False, "buttons": [], "format": "jpeg"}
    with gr.Blocks(title=f"coadvise: {viewer.name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {viewer.name}\n{viewer.about}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                photo = gr.Image(
                    type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Photograph", height=280,
                    buttons=[],
                )  # fmt: skip
            with gr.Column(scale=3, min_width=300):
                message = gr.Markdown(elem_id="message")
                if files := _example_files(viewer, folder):
                    gr.Examples(files, photo, cache_examples=False, label="Pictures that the run was scored on")
        with gr.Column(visible=False) as results:
            gr.Markdown(f"## What is it?\n{viewer.columns}")
            with gr.Row(elem_classes="opinions"):
                labels = [gr.Label(label=title, num_top_classes=SHOWN, min_width=150) for title in viewer.titles]
            if viewer.looks:
                gr.Markdown("## Where does each token look?\nIn the last block; dark where it does not.")
            attention = gr.Gallery(visible=viewer.looks, elem_classes="pictures", **pictures)
            gr.Markdown(f"## Nearest training pictures\n{viewer.neighbours}")
            nearest = gr.Gallery(visible=viewer.nearest is not None, elem_classes="pictures", **pictures)

        def show(given: dict[str, Any] | None) -> dict[Any, Any]:
            """Gets the file as it was uploaded, which Gradio has checked to be one of its own folder."""
            if given is None:  # removed, by the user or for the message that is shown
                return {results: gr.Column(visible=False)}
            path = Path(given["path"])
            try:
                seen = viewer(path.read_bytes(), given.get("orig_name") or path.name)
            except UnreadableImageError as error:
                return {message: f"**This picture cannot be read:** {error}", photo: None}
            found = {message: "", results: gr.Column(visible=True), attention: seen.attention, nearest: seen.nearest}
            return found | dict(zip(labels, seen.answers, strict=True))

        photo.change(
            show, photo, [photo, message, results, *labels, attention, nearest], preprocess=False, api_name="show",
            show_progress="minimal",
        )  # fmt: skip
    return blocks


def _example_files(viewer: Viewer, folder: Path) -> list[list[str]]:
    files = []
    for name, content in viewer.examples():
        path = folder / name
        path.write_bytes(content)
        files.append([str(path)])
    return files
