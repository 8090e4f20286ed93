"""Chat templates: the built-in ones by name, and the one most input models share."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from model_fusion.errors import InputError
from model_fusion.tokenizer.table import read_object

BUILT_IN: dict[str, str] = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('roles after the system message are user and assistant') }}{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}


def template_of(files: Mapping[str, bytes], where: str) -> str | None:
    """The chat template of a model's small files."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_object(files, name, where).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = next(
                (one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None
            )
        if isinstance(found, str):
            return found
    return None


def choose(asked: str, found: Sequence[str | None]) -> str | None:
    """The template that `asked` means: auto (the commonest of `found`, the first of equals), a built-in name, or
    Jinja text itself. Raises `InputError` for any other word."""
    if asked == "auto":
        counts = Counter(text for text in found if text)
        return counts.most_common(1)[0][0] if counts else None
    if asked in BUILT_IN:
        return BUILT_IN[asked]
    if "{" not in asked:
        words = ", ".join(["auto", *BUILT_IN])
        raise InputError(f"chat_template {asked!r} is neither one of {words} nor a Jinja text")
    return asked


def with_template(files: Mapping[str, bytes], template: str, where: str) -> dict[str, bytes]:
    """The files with that template and no other."""
    result = {name: data for name, data in files.items() if name != "chat_template.json"}
    config = read_object(files, "tokenizer_config.json", where)
    if config.pop("chat_template", None) is not None:
        result["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    result["chat_template.jinja"] = template.encode()
    return result
