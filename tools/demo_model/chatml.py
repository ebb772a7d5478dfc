"""The chat format of the demo model: ChatML, as a template for engines and as a function for training."""

from __future__ import annotations

#: Chat template in the GGUF file and in the MLX folder.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: Tokens that no text produces. The first fills up batches, the last ends every turn.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def render(user: str, system: str | None = None) -> str:
    """The prompt up to where the answer begins: what ``CHATML`` makes of these messages."""
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{head}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
