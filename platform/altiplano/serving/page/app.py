"""The chat page as an ASGI application, and as a Ray Serve deployment.

It talks to the service only by its HTTP API, as any client, with the visitor's own API key. Knows
where things stand on the page, not what they do. The drawing is Gradio's, whose import costs about
two seconds and 100 MiB; nothing is fetched from the internet, and nothing is reported to anyone.
"""

import os
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware

from altiplano.serving.page.arena import Votes
from altiplano.serving.page.arena_tab import ArenaTab
from altiplano.serving.page.chat_tab import ChatTab
from altiplano.serving.page.client import Service, ServiceError
from altiplano.serving.page.completion_tab import CompletionTab
from altiplano.serving.page.panel import Panel, line
from altiplano.serving.page.shield import Shield

_VISITORS = 256
"""Answers that may come at once."""
_FONTS = ("system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif")
_MONO = ("ui-monospace", "Noto Sans Mono CJK SC", "monospace")
_CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto; }
#panel { order: 2; }
#title h1 { font-size: 1.25rem; margin: 0.25rem 0 0; }
#chat-box, #arena-box-left, #arena-box-right { border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-lg); }
/* The framework's own bin would clear what is shown, not what is remembered. */
button[aria-label="Clear"] { display: none; }
.thought-group { border: none !important; background: none !important; padding: 0 !important; }
.thought-group .arrow { display: none; }
.message-markdown-disabled .md { white-space: pre-wrap; overflow-wrap: anywhere; }
.line, .line * { border: none !important; background: none !important; box-shadow: none !important;
  padding: 0 !important; }
"""


def make_page(api_url: str, root_path: str = "/chat", data_dir: Path = Path("page")) -> FastAPI:
    """Build the page.

    Mount it at `root_path`, as Serve does with a route prefix: requests carry the full path.

    Args:
        api_url: where this process reaches the service, with or without `/v1`.
        root_path: the page's path for browsers.
        data_dir: folder that keeps the arena's votes.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    service = Service(api_url)
    app = FastAPI(
        root_path=root_path,
        docs_url=None,
        openapi_url=None,
        middleware=[Middleware(Shield, prefix=root_path)],
    )
    return gr.mount_gradio_app(
        app,
        _draw(service, Votes(data_dir)),
        path="/",
        root_path=root_path,
        footer_links=[],
        # Otherwise the browser keeps every call, API key included.
        run_history=False,
        show_error=False,
        max_file_size=0,
        ssr_mode=False,
        enable_monitoring=False,
        theme=gr.themes.Default(font=_FONTS, font_mono=_MONO),
        css=_CSS,
    )


class Page:
    """For `serve.ingress`; one replica, because a visitor's session lives in its process."""

    def __init__(self, api_url: str, data_dir: str, root_path: str = "/chat") -> None:
        """As for `make_page`; `root_path` is the application's route prefix."""
        self._built = make_page(api_url, root_path, Path(data_dir))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve serves, once the constructor is through."""
        return self._built


def _draw(service: Service, votes: Votes) -> gr.Blocks:
    with gr.Blocks(title="Altiplano", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# Altiplano", elem_id="title")
        status = line("status", visible=False)
        with gr.Row():
            # First here, because the tabs need it, and last in the look (see the CSS).
            with gr.Column(scale=1, min_width=260, elem_id="panel"):
                panel = Panel()
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Chat", elem_id="tab-chat"):
                    chat = ChatTab(service, panel)
                with gr.Tab("Completion", elem_id="tab-completion"):
                    completion = CompletionTab(service, panel)
                with gr.Tab("Arena", elem_id="tab-arena"):
                    arena = ArenaTab(service, panel, votes)
        choices = [chat.model, completion.model, arena.left, arena.right]
        _offer_models(page, service, panel, status, choices)
        page.load(arena.rows, None, arena.table, show_progress="hidden", api_visibility="private")
    return page.queue(default_concurrency_limit=_VISITORS, max_size=_VISITORS, api_open=False)


def _offer_models(
    page: gr.Blocks,
    service: Service,
    panel: Panel,
    status: gr.Textbox,
    choices: list[gr.Dropdown],
) -> None:
    """Fill the choices of models when the page is opened, and anew with each API key."""

    async def offer(key: str) -> dict[Any, Any]:
        try:
            names = await service.models(key)
        except ServiceError as error:
            return {status: gr.update(value=f"⚠ {error}", visible=True)}
        updates: dict[Any, Any] = {status: gr.update(value="", visible=False)}
        for number, choice in enumerate(choices):
            # The arena's right side starts with another model than its left.
            last = number == len(choices) - 1
            updates[choice] = gr.update(choices=names, value=names[-1 if last else 0])
        return updates

    gr.on(
        [page.load, panel.key.submit, panel.key.blur],
        offer,
        panel.key,
        [status, *choices],
        show_progress="hidden",
        api_visibility="private",
    )
