"""The page's parts and what they do. Everything that runs goes through the server's queue."""

from __future__ import annotations

import functools
import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from wanjax import demo
from wanjax.errors import InputError
from wanjax.page import controls, look
from wanjax.sampling import presets, recorded
from wanjax.sampling.given import frame_index
from wanjax.serving.api import Server
from wanjax.serving.jobs import OVER, FullError, Job, Order
from wanjax.serving.requests import adapters, spoken
from wanjax.serving.worker import Live

NO_PRESET = "none"
LONGEST_WAIT = 0.5
"""Seconds between looks at a job."""
LISTED = 8
SEEDS = 2**32
PLAYER: dict[str, Any] = {"autoplay": True, "loop": True, "interactive": False, "buttons": ["download"]}


class Page:
    """The page over a server.

    Args:
      server: whose queue, limits and checks are used.
    """

    def __init__(self, server: Server):
        self.server, self.reader, self.jobs, self.worker = server, server.reader, server.jobs, server.worker
        self.config, self.limits = self.reader.pipe.config, self.reader.limits
        self.settings: dict[str, Any] = {}
        self.is_demo = self.reader.model == "demo"

    # ------------------------------------------------------------------------------------------------------------ parts

    def build(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title="wanjax", analytics_enabled=False, fill_width=True) as blocks:
            gr.HTML(look.header(self.reader.model, self.about()), padding=False)
            self.job, self.mine = gr.State(""), gr.State([])
            self.keyframes, self.loras, self.shown = gr.State([]), gr.State([]), gr.State("")
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=5, min_width=320, elem_id="inputs"):
                    self.build_inputs()
                with gr.Column(scale=5, min_width=320, elem_id="folds"):
                    self.build_folds()
                with gr.Column(scale=6, min_width=320, elem_id="outputs"):
                    self.build_outputs()
            self.connect()
        return blocks

    def about(self) -> str:
        """What the checkpoint makes."""
        return f"{self.config.frames} frames, {self.config.steps} steps"

    def build_inputs(self) -> None:
        """What a request is made of."""
        config = self.config
        self.example = example = (
            (str(demo.FOLDER / "first.png"), str(demo.FOLDER / "last.png")) if self.is_demo else (None, None)
        )
        with gr.Row(elem_id="pictures"):
            self.first, self.last = (
                gr.Image(value=path, type="filepath", sources=["upload", "clipboard"], label=label, height=190,
                         min_width=140, elem_id=id, buttons=[])
                for path, label, id in zip(example, ("First frame", "Last frame"), ("first", "last"), strict=True)
            )  # fmt: skip
        prompt = (demo.FOLDER / "caption.txt").read_text().strip() if self.is_demo else config.prompt
        self.settings["prompt"] = gr.Textbox(
            prompt, label="Prompt", placeholder="What happens between the two pictures", lines=3, max_lines=8,
            elem_id="setting-prompt",
        )  # fmt: skip
        self.extend = gr.Checkbox(
            label="Write the prompt out", info="A language model adds what changes between the pictures.",
            visible=self.reader.can_extend, elem_id="extend",
        )  # fmt: skip
        with gr.Row(elem_id="go"):
            self.generate = gr.Button("Generate", variant="primary", scale=3, min_width=140, elem_id="generate")
            self.stop = gr.Button("Stop", scale=1, min_width=90, interactive=False, elem_id="stop")
        with gr.Row(elem_classes="compact"):
            most = max(self.limits.max_frames, config.frames)
            self.settings["frames"] = gr.Slider(
                1, most, config.frames, step=4, label="Frames", info=f"At {config.fps:g} a second.",
                elem_id="setting-frames", min_width=160,
            )  # fmt: skip
            self.settings["steps"] = gr.Slider(
                1, max(self.limits.max_steps, config.steps), config.steps, step=1, label="Steps",
                info="More are finer and slower.", elem_id="setting-steps", min_width=160,
            )  # fmt: skip

    def build_folds(self) -> None:
        """What most requests leave as it is."""
        self.build_keyframes()
        self.build_loras()
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            self.build_advanced()
        with gr.Accordion("Settings of an earlier video", open=False, elem_id="restore-fold"):
            self.dropped = gr.File(label="Drop a video made here", file_types=[".mp4"], height=120, elem_id="restore")

    def build_keyframes(self) -> None:
        """Pictures between, on a line of time."""
        with gr.Accordion("Keyframes", open=False, elem_id="keyframes"):
            line = self.draw_line(self.example[0], self.example[1], [], self.config.frames, self.config.fps)
            self.line = gr.HTML(line, padding=False, elem_id="time-line")
            self.add_keyframe = gr.UploadButton(
                "Add a picture", file_types=["image"], size="sm", elem_id="add-keyframe"
            )

            @gr.render(inputs=[self.keyframes])
            def rows(keyframes: list[dict]) -> None:
                for i, keyframe in enumerate(keyframes):
                    with gr.Row(elem_classes="keyframe", key=f"keyframe {keyframe['id']}"):
                        place = gr.Slider(0, 100, keyframe["at"], step=1, label=f"Picture {i + 1}: % of the video",
                                          scale=4, interactive=True, min_width=160,
                                          key=f"place {keyframe['id']}")  # fmt: skip
                        away = gr.Button("Remove", size="sm", scale=1, min_width=80)
                    place.release(
                        lambda at, kept, i=i: controls.changed(kept, i, at=at),
                        [place, self.keyframes], self.keyframes, show_progress="hidden",
                    )  # fmt: skip
                    away.click(lambda kept, i=i: controls.without(kept, i), self.keyframes, self.keyframes)

    def build_loras(self) -> None:
        """Adapters: of the server's folder, or uploaded."""
        with gr.Accordion("LoRA", open=False, elem_id="loras"):
            names = sorted(adapters(self.limits.lora_dir))
            self.choose_lora = gr.Dropdown(names, label="Of this server", visible=bool(names), value=None)
            self.add_lora = gr.UploadButton("Add a file", file_types=[".safetensors"], size="sm", elem_id="add-lora")

            @gr.render(inputs=[self.loras])
            def rows(loras: list[dict]) -> None:
                for i, adapter in enumerate(loras):
                    with gr.Row(elem_classes="keyframe", key=f"lora {adapter['path']}"):
                        strength = gr.Slider(-1, 2, adapter["strength"], step=0.05, label=Path(adapter["path"]).stem,
                                             info="Strength", scale=4, interactive=True, min_width=160,
                                             key=f"strength {adapter['path']}")  # fmt: skip
                        away = gr.Button("Remove", size="sm", scale=1, min_width=80)
                    strength.release(
                        lambda strength, kept, i=i: controls.changed(kept, i, strength=strength),
                        [strength, self.loras], self.loras, show_progress="hidden",
                    )  # fmt: skip
                    away.click(lambda kept, i=i: controls.without(kept, i), self.loras, self.loras)

    def build_advanced(self) -> None:
        """A component for each field, and presets, which fill some of them."""
        self.preset = gr.Dropdown(
            [NO_PRESET, *presets.names()], value=NO_PRESET, label="Preset", elem_id="preset",
            info="Settings of few-step weights; fills the fields below.",
        )  # fmt: skip
        with gr.Row(elem_classes="compact"):
            self.random = gr.Checkbox(True, label="New seed each time", elem_id="random", min_width=130)
            for name in ("seed", "width", "height"):
                self.settings[name] = controls.component(name, self.config, min_width=120)
        for heading, names in controls.by_heading().items():
            gr.HTML(f'<h2 class="small">{heading}</h2>', padding=False)
            with gr.Row(elem_classes="fields"):
                for name in names:
                    self.settings[name] = controls.component(name, self.config)

    def build_outputs(self) -> None:
        """What comes out."""
        self.progress = gr.HTML(look.bar(0, "Ready"), padding=False, elem_id="progress")
        with gr.Row(elem_id="videos"):
            with gr.Column(min_width=240):
                self.stage = gr.HTML(look.stage_empty(), padding=False, elem_id="stage")
                self.video = gr.Video(label="Result", visible=False, elem_id="result", **PLAYER)
            with gr.Column(min_width=240, visible=False, elem_id="before") as self.before:
                self.previous = gr.Video(label="The one before", elem_id="previous", **PLAYER)
        gr.HTML('<h2 class="small">Queue</h2>', padding=False)
        self.queue = gr.HTML(look.queue([], [], None), padding=False, elem_id="queue")
        self.timer = gr.Timer(2.0)

    # ----------------------------------------------------------------------------------------------------------- events

    def connect(self) -> None:
        """What happens when."""
        values = list(self.settings.values())
        inputs = [self.first, self.last, self.keyframes, self.loras, self.extend, self.random, self.shown, self.mine]
        outputs = [self.job, self.mine, self.shown, self.generate, self.stop, self.progress, self.stage, self.video,
                   self.before, self.previous, self.settings["seed"]]  # fmt: skip
        self.generate.click(
            functools.partial(self.run, outputs), [*inputs, *values], outputs, show_progress="hidden",
            concurrency_limit=None, api_visibility="private",
        )  # fmt: skip
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        self.stop.click(self.end, self.job, self.stop, queue=False, **quiet)
        self.timer.tick(self.listed, self.mine, self.queue, queue=False, **quiet)
        self.preset.change(self.apply_preset, self.preset, values, **quiet)
        self.dropped.upload(self.restore, self.dropped, [*values, self.loras, self.random, self.progress], **quiet)
        self.add_keyframe.upload(self.with_keyframe, [self.add_keyframe, self.keyframes], self.keyframes, **quiet)
        self.add_lora.upload(self.with_lora, [self.add_lora, self.loras], self.loras, **quiet)
        self.choose_lora.input(self.with_named_lora, [self.choose_lora, self.loras], self.loras, **quiet)
        watched = [self.first, self.last, self.keyframes, self.settings["frames"], self.settings["fps"]]
        gr.on([x.change for x in watched], self.draw_line, watched, self.line, **quiet)

    def run(self, outputs: list[Any], *given: Any) -> Iterator[dict[Any, Any]]:
        """Put a request into the queue, and show what becomes of it."""
        first, last, keyframes, loras, extend, is_random, shown, mine, *values = given
        seed = random.randrange(SEEDS) if is_random else None
        try:
            order = self.order(first, last, keyframes, loras, extend, seed, values)
            job, _ = self.jobs.add(order)
        except InputError as error:
            yield {self.progress: look.problem(spoken(str(error)))}
            return
        except FullError:
            yield {self.progress: look.problem(f"{self.jobs.most_waiting} requests wait already; come again later")}
            return
        self.server.metrics.accepted.inc()
        yield {
            self.job: job.id, self.mine: [*mine, job.id], self.generate: gr.update(interactive=False),
            self.stop: gr.update(interactive=True), self.progress: look.progress(job, None, self.jobs.ahead(job), 0),
            self.stage: gr.update(value=look.stage_empty(), visible=True), self.video: gr.update(visible=False),
            self.settings["seed"]: job.settings["seed"],
        }  # fmt: skip
        yield from self.watch(job)
        yield self.ended(job.id, shown)

    def order(self, first: Any, last: Any, keyframes: Any, loras: Any, extend: bool, seed: Any, values: Any) -> Order:
        """What the page holds, checked as any request.

        Raises:
          InputError: as `Reader.read`.
        """
        body = {
            name: controls.read(name, value, self.config) for name, value in zip(self.settings, values, strict=True)
        }
        body["seed"] = body["seed"] if seed is None else seed
        settings = self.reader.settings(body)
        places = [("first", first), ("last", last), *((f"{x['at']}%", x["path"]) for x in keyframes)]
        pictures = tuple((place, Path(path).read_bytes()) for place, path in places if path)
        adapters = tuple(f"{x['path']}:{x['strength']:g}" for x in loras)
        request = self.reader.check(settings, pictures, adapters)
        return Order(recorded.settings(request), pictures, adapters, extend and self.reader.can_extend)

    def watch(self, job: Job) -> Iterator[dict[Any, Any]]:
        """What changes while a job waits and runs."""
        seen, previews = None, -1
        while (now := self.jobs.get(job.id)) is not None and now.state not in OVER:
            live = self.live(job.id)
            ahead = self.jobs.ahead(now)
            if (state := (now.state, ahead, live and (live.stage, live.done))) != seen:
                seen = state
                updates = {self.progress: look.progress(now, live, ahead, self.worker.decode_seconds)}
                if live is not None and live.previews != previews:
                    previews = live.previews
                    updates[self.stage] = look.stage_preview(live, now.settings["fps"])
                yield updates
            self.jobs.wait(LONGEST_WAIT)

    def live(self, id: str) -> Live | None:
        """How far the job is, if it is the one that runs."""
        live = self.worker.live
        return live if live is not None and live.id == id else None

    def ended(self, id: str, shown: str) -> dict[Any, Any]:
        """A job is over: its video, beside the one before."""
        job = self.jobs.get(id)
        updates: dict[Any, Any] = {
            self.generate: gr.update(interactive=True), self.stop: gr.update(interactive=False),
            self.progress: look.problem("it was deleted") if job is None else look.progress(job, None, 0, 0),
        }  # fmt: skip
        if job is None or job.state != "completed":
            return updates | {self.stage: gr.update(value=look.stage_empty())}
        path = str(self.jobs.video(id))
        updates |= {self.shown: path, self.stage: gr.update(visible=False)}
        updates |= {self.video: gr.update(value=path, visible=True)}
        if shown and Path(shown).exists():
            updates |= {self.before: gr.update(visible=True), self.previous: gr.update(value=shown)}
        return updates

    def end(self, id: str) -> Any:
        """Stop the job within a step."""
        if id:
            self.worker.cancel(id)
        return gr.update(interactive=False)

    def listed(self, mine: list[str]) -> str:
        """The queue, as this visitor may see it."""
        jobs = self.jobs.list(LISTED, newest_first=False, states=("running", "queued"))
        over = [job for job in (self.jobs.get(id) for id in mine[-LISTED:]) if job is not None and job.state in OVER]
        return look.queue([*jobs, *reversed(over)][:LISTED], mine, self.worker.live)

    # ----------------------------------------------------------------------------------------------- settings and files

    def apply_preset(self, preset: str) -> list[Any]:
        """The preset's settings in their components, and the server's in the others that presets set."""
        if preset == NO_PRESET:
            found = {name: getattr(self.config, name) for name in presets.ACCEPTED}
        else:
            found = presets.read(preset)
        return [
            gr.update(value=controls.show(name, found[name])) if name in found else gr.skip() for name in self.settings
        ]

    def restore(self, path: str) -> list[Any]:
        """The settings of a video, in their components."""
        others = [gr.skip()] * len(self.settings)
        try:
            found, names = recorded.read(path)
        except InputError as error:
            return [*others, gr.skip(), gr.skip(), look.problem(str(error))]
        loras, missing = self.found_loras(names)
        told = "Settings restored" + (f"; without {', '.join(missing)}, which is not here" if missing else "")
        values = [
            gr.update(value=controls.show(name, found[name])) if name in found else gr.skip() for name in self.settings
        ]
        return [*values, loras, False, look.bar(0, told)]

    def found_loras(self, names: tuple[str, ...]) -> tuple[list[dict], list[str]]:
        """Adapters by their names, as far as they are here, and the names of the others."""
        here = adapters(self.limits.lora_dir) | adapters(str(self.uploads()))
        found, missing = [], []
        for given in names:
            name, _, strength = given.partition(":")
            if name in here:
                found.append({"path": str(here[name]), "strength": float(strength or 1)})
            else:
                missing.append(name)
        return found, missing

    def uploads(self) -> Path:
        """The folder of uploaded adapters."""
        folder = self.jobs.folder / "loras"
        folder.mkdir(exist_ok=True)
        return folder

    def with_keyframe(self, path: str, keyframes: list[dict]) -> list[dict]:
        """One picture more, in the middle of the widest gap."""
        places = sorted([0, 100, *(x["at"] for x in keyframes)])
        gap, start = max((b - a, -a) for a, b in itertools.pairwise(places))
        return [*keyframes, {"id": random.randrange(SEEDS), "path": path, "at": gap // 2 - start}]

    def with_lora(self, path: str, loras: list[dict]) -> list[dict]:
        """One adapter more, from a file that was uploaded."""
        target = self.uploads() / Path(path).name
        if not target.exists():
            shutil.copy(path, target)
        return [*loras, {"path": str(target), "strength": 1.0}]

    def with_named_lora(self, name: str, loras: list[dict]) -> list[dict]:
        """One adapter more, of the server's folder."""
        found = adapters(self.limits.lora_dir).get(name)
        return loras if found is None else [*loras, {"path": str(found), "strength": 1.0}]

    def draw_line(self, first: Any, last: Any, keyframes: list[dict], frames: int, fps: float) -> str:
        """The line of time."""
        frames = max(1, int(frames or 1))
        marks = [(0.0, first), (1.0, last)]
        for keyframe in keyframes:
            marks.append((frame_index(f"{keyframe['at']}%", frames, 1) / max(1, frames - 1), keyframe["path"]))
        return look.time_line([(share, path) for share, path in marks if path], frames, float(fps or 16))


def mount(server: Server) -> None:
    """Put the page at the root of a server's application; with an API key it asks for that as a password."""
    import os

    from wanjax.serving.api import KEY

    key = os.environ.get(KEY)
    blocks = Page(server).build()
    blocks.queue(default_concurrency_limit=None)
    gr.mount_gradio_app(
        server.app, blocks, path="", auth=("wanjax", key) if key else None, footer_links=[], ssr_mode=False,
        allowed_paths=[str(server.jobs.folder.resolve()), str(demo.FOLDER)], theme=theme(), css=look.CSS,
        max_file_size=f"{server.reader.limits.max_upload}mb", enable_monitoring=False,
        auth_message="The password is this server's API key; the name is wanjax.",
    )  # fmt: skip


def theme() -> gr.themes.Base:
    """Quiet colours, and fonts that every machine has."""
    fonts = ("Inter", "system-ui", "sans-serif")
    soft = gr.themes.Soft(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", font=fonts,
        font_mono=("ui-monospace", "monospace"), radius_size="lg", spacing_size="md", text_size="md",
    )  # fmt: skip
    return soft.set(  # enough contrast for all eyes
        body_background_fill="*neutral_50", block_border_width="1px", block_shadow="none",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        block_title_text_color="*primary_800", block_label_text_color="*primary_800",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        slider_color="*primary_700", checkbox_border_color="*neutral_500", input_placeholder_color="*neutral_500",
    )  # fmt: skip
