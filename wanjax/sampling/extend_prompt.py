"""A prompt written out by a language model that sees the given pictures: 80 to 100 words about what changes.

    extend = make_extend("http://localhost:8000/v1")
    prompt, note = extend("a bird flies", [first, last])
    config, notes = write_out(config)         # the same, where the configuration asks for it

Any server of OpenAI's chat completions does: vLLM, llama.cpp, Ollama, LM Studio, or a hosted one. Wan was trained on
long captions, and its authors write prompts out in the same way (Wan2.1 `wan/utils/prompt_extend.py`); the template is
ours. Whatever goes wrong, the prompt stays as it was, and a line says so.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image

from sharding.distributed import is_main, same_text
from wanjax.conditioning.images import read_image
from wanjax.config import SampleConfig
from wanjax.errors import InputError, one_line
from wanjax.sampling.given import pictures_by_frame

KEY = "WANJAX_PROMPT_KEY"
"""The environment variable with the key that the endpoint wants, if it wants one."""
SECONDS = 60
SIDE = 768
"""Pixels of the longer side of a picture that is sent."""
LEAST, MOST = 20, 200
"""Words of an answer that is taken; the template asks for 80 to 100."""
TEMPLATE = """\
You write prompts for a model that makes a short video. You get {pictures} and a user's prompt, which may be empty.
Write one paragraph of 80 to 100 words in English that describes the video as it plays.
- Say who or what is seen, in a few words, and the style (photograph, drawing, animation, ..) if it shows.
- Spend most words on what changes: how things move, turn, appear, leave or become something else, in which order, and \
how the camera moves or that it stands still.
{ends}- Keep everything that the user asks for. Names and texts in quotation marks stay as they are.
- Describe only what can be seen. No instructions, no lists, no quotation marks around the whole, no remarks.
Answer with the paragraph alone."""
BOTH = """\
- The first picture is the first frame, the last picture is the last frame. Say what happens between so that the one \
becomes the other; do not describe them apart, and do not name the pictures or frames.
"""
FIELDS = ("extend_prompt", "extend_model")
"""Of `SampleConfig`, that say who is asked."""
Extend = Callable[[str, Sequence[PIL.Image.Image]], tuple[str, str | None]]
"""Prompt and pictures in order to the prompt written out, and a line where it is as it was."""


def make_extend(url: str, model: str | None = None) -> Extend:
    """What asks an endpoint.

    Args:
      url: its base, such as http://localhost:8000/v1.
      model: the model's name there; None: the first that it lists.

    Raises:
      InputError: the address is none, or httpx is not installed.
    """
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
        raise InputError(f"--extend-prompt {url}; http://HOST:PORT/v1 is accepted, of an OpenAI-compatible server")
    try:
        import httpx
    except ImportError as error:
        raise InputError("httpx is not installed; --extend-prompt needs it; pip install 'wanjax[prompt]'") from error

    def extend(prompt: str, pictures: Sequence[PIL.Image.Image]) -> tuple[str, str | None]:
        headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY)) else {}
        try:
            with httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=SECONDS) as client:
                name = model or client.get("models").raise_for_status().json()["data"][0]["id"]
                body = request(name, prompt, pictures)
                answer = client.post("chat/completions", json=body).raise_for_status().json()
            return checked(answer["choices"][0]["message"]["content"]), None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError, AttributeError) as error:
            why = one_line(error)[:200] or type(error).__name__
            return prompt, f"note: the prompt is as given: {url} did not write it out ({why})"

    return extend


def write_out(config: SampleConfig) -> tuple[SampleConfig, tuple[str, ...]]:
    """The configuration with its prompt written out, if it asks for that, and a line about it.

    Of several processes the first one asks, and all get what it got.

    Raises:
      InputError: as `make_extend`, or a picture cannot be read.
    """
    if config.extend_prompt is None:
        return config, ()
    extend, pictures = make_extend(config.extend_prompt, config.extend_model), [*pictures_by_frame(config).values()]
    prompt, note = extend(config.prompt, [read_image(x) for x in pictures]) if is_main() else ("", None)
    prompt, note = json.loads(same_text(json.dumps([prompt, note])))
    config = dataclasses.replace(config, prompt=prompt, **dict.fromkeys(FIELDS))
    return config, (note or f"prompt, written out: {prompt}",)


def request(model: str, prompt: str, pictures: Sequence[PIL.Image.Image]) -> dict[str, Any]:
    """The body of a chat completion: the template, the pictures in order, and the prompt."""
    words = {0: "no picture", 1: "the first frame as a picture"}.get(len(pictures), f"{len(pictures)} pictures")
    system = TEMPLATE.format(pictures=words, ends=BOTH if len(pictures) > 1 else "")
    content = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    content.append({"type": "text", "text": f"The user's prompt: {prompt.strip() or '(empty)'}"})
    messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": 400, "temperature": 0.7}


def data_url(picture: PIL.Image.Image) -> str:
    """A picture, made small, as an address that holds it."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def checked(text: str) -> str:
    """The paragraph of an answer, without a thinking model's thoughts.

    Raises:
      ValueError: it is none.
    """
    text = " ".join(re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).split()).strip('"“”')
    words = len(text.split())
    if not LEAST <= words <= MOST:
        raise ValueError(f"an answer of {words} words, where 80 to 100 were asked for")
    return text
