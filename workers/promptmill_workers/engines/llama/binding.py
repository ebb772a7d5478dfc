"""The border to llama.cpp: its low-level bindings, with names and types of ours. No ctypes leave it."""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections import deque
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import psutil
from llama_cpp._ggml import libggml
from numpy.typing import NDArray

from promptmill.errors import DeviceError, ModelError
from promptmill_workers.engines.llama.batch import Batch
from promptmill_workers.engines.llama.sampling import GREEDY, Shape, make_sampler
from promptmill_workers.engines.llama.vocabulary import Vocabulary

log = logging.getLogger("promptmill.llamacpp")

#: What llama_decode returns when the KV cache has no room for the batch.
NO_ROOM = 1

#: Outputs of a step beside one of each sequence: of continuations that are scored.
SCORED_OUTPUTS = 32

#: Lines of the engine's log that are kept to explain a failure.
KEPT_LINES = 200

#: Numbers of the KV cache by name: those of ggml.h.
KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}

#: Context of a model whose file does not say what it was trained for.
CONTEXT_UNKNOWN = 4096

#: GGML_LOG_LEVEL_DEBUG of ggml.h, which the bindings do not name.
LOG_DEBUG = 1

_lines: deque[str] = deque(maxlen=KEPT_LINES)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, user: Any) -> None:
    # Debug lines come with every token, and would push out those that explain a failure.
    if level == LOG_DEBUG and not log.isEnabledFor(logging.DEBUG):
        return
    line = text.decode(errors="replace").rstrip()
    if line:
        _lines.append(line)
        log.debug("%s", line)


# Before anything else is called: the default floods stderr.
llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def _complaint() -> str:
    """The last line of the log that speaks of an error."""
    bad = [line for line in _lines if re.search(r"error|fail|invalid|unable", line, re.IGNORECASE)]
    return (bad or list(_lines) or ["no reason was given"])[0][:200]


class LlamaModel:
    """A GGUF in memory; with ``vocab_only`` only its words and its header."""

    def __init__(self, path: Path, *, vocab_only: bool = False, gpu: bool = False, plain_kernels: bool = False) -> None:
        """Raises ModelError for a file that cannot be loaded, DeviceError for a GPU that cannot be used."""
        if gpu and not llama_cpp.llama_supports_gpu_offload():
            raise DeviceError(
                "the installed llama-cpp-python was built without GPU support",
                hint="Build it for this GPU (README, 'GPUs'), or use --device cpu.",
            )
        _lines.clear()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = -1 if gpu else 0
        params.use_extra_bufts = not plain_kernels
        self.handle = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise ModelError(
                f"{path.name} cannot be loaded: {_complaint()}", hint="The file may be damaged: fetch it again."
            )
        self.offloaded, self.layers = _offload(self.handle)
        if gpu and not self.offloaded:
            self.close()
            raise DeviceError(
                "no layer of the model went to the GPU", hint="Use --device cpu, or a GPU with more memory."
            )
        self.vocabulary = Vocabulary(self.handle)
        buffer = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_desc(self.handle, buffer, len(buffer))
        #: Whether every weight is a float32 ("llama 2B all F32"): such a file is run to compare texts, not for speed.
        self.is_float32 = b"all F32" in buffer.value
        # The header, because a vocabulary alone has no n_ctx_train.
        architecture = self._header("general.architecture")
        self.context_trained = int(self._header(f"{architecture}.context_length") or CONTEXT_UNKNOWN)
        # Recurrent memory is a state and not a list of cells: a part of it cannot be copied.
        self.has_cells = not (
            llama_cpp.llama_model_is_recurrent(self.handle) or llama_cpp.llama_model_is_hybrid(self.handle)
        )
        #: Tokens that layers with a sliding window look back on; 0 where all layers look at everything.
        self.window = int(llama_cpp.llama_model_n_swa(self.handle))

    def _header(self, key: str) -> str:
        """A value of the file's header as text; empty when it is not there."""
        buffer = ctypes.create_string_buffer(256)
        size = llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if size >= 0 else ""

    def cell_bytes(self, kv_type: str = "f16") -> int:
        """Memory of the KV cache for one token over all layers."""
        heads = int(llama_cpp.llama_model_n_head(self.handle)) or 1
        kv_heads = int(llama_cpp.llama_model_n_head_kv(self.handle))
        width = int(llama_cpp.llama_model_n_embd(self.handle)) // heads
        architecture = self._header("general.architecture")
        key = int(self._header(f"{architecture}.attention.key_length") or width)
        value = int(self._header(f"{architecture}.attention.value_length") or width)
        # q8_0 holds 32 values in 34 bytes.
        bits = 16 if kv_type == "f16" else 8.5
        return int(int(llama_cpp.llama_model_n_layer(self.handle)) * kv_heads * (key + value) * bits / 8)

    def free_bytes(self) -> int | None:
        """Free memory of the device that the model is on; None when it cannot be told."""
        if not self.offloaded:
            # The file is mapped: its pages count as free, and are needed.
            return max(0, psutil.virtual_memory().available - int(llama_cpp.llama_model_size(self.handle)))
        free = [_device_memory(index) for index in range(libggml.ggml_backend_dev_count())]
        known = [amount for amount in free if amount]
        return min(known) if known else None

    @property
    def chat_template(self) -> str | None:
        source = llama_cpp.llama_model_chat_template(self.handle, None)
        return source.decode(errors="replace") if source else None

    @property
    def tool_template(self) -> str | None:
        """A template for tools alone, of models that have one beside the other."""
        source = llama_cpp.llama_model_chat_template(self.handle, b"tool_use")
        return source.decode(errors="replace") if source else None

    def device_name(self) -> str:
        """The device by the engine's own log; ``cpu`` when nothing was offloaded."""
        if not self.offloaded:
            return "cpu"
        named = [match[1] for line in _lines if (match := re.search(r"using device (.+?) - ", line))]
        return named[0] if named else "gpu"

    def close(self) -> None:
        if self.handle:
            llama_cpp.llama_model_free(self.handle)
            self.handle = None


#: GGML_BACKEND_DEVICE_TYPE_GPU of ggml-backend.h, which the bindings do not name.
DEVICE_GPU = 1

libggml.ggml_backend_dev_count.restype = ctypes.c_size_t
libggml.ggml_backend_dev_get.restype = ctypes.c_void_p
libggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]


def _device_memory(index: int) -> int | None:
    """Free bytes of a GPU; None for other devices."""
    device = ctypes.c_void_p(libggml.ggml_backend_dev_get(index))
    if libggml.ggml_backend_dev_type(device) != DEVICE_GPU:
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    libggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return free.value


def _offload(handle: Any) -> tuple[int, int]:
    """Layers on the GPU and layers in all, from the log of the load; the engine has no call for it."""
    for line in _lines:
        match = re.search(r"offloaded (\d+)/(\d+) layers", line)
        if match:
            return int(match[1]), int(match[2])
    return 0, int(llama_cpp.llama_model_n_layer(handle)) + 1


def _flash_attention() -> str:
    """What was set up for the last context: the log names what was asked for, and what ``auto`` came to."""
    asked = [match[1] for line in _lines if (match := re.search(r"flash_attn\s+= (\w+)", line))]
    if asked and asked[-1] != "auto":
        return "on" if asked[-1] == "enabled" else "off"
    return "on" if any(re.search(r"Flash Attention.* enabled", line) for line in _lines) else "off"


class Context:
    """KV cells, sequences, samplers and the batch of one step.

    Samplers run inside the compute graph: what comes back of a step is a token, not a vocabulary of logits.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        cells: int,
        batch: int,
        slots: int,
        spare: int,
        threads: int,
        exact: bool = False,
        kv_type: str = "f16",
    ) -> None:
        """``spare`` sequences beside the slots hold shared prefixes. Raises ModelError when memory does not suffice.

        ``exact``, and a float32 model on a CPU, do without flash attention: it is half as fast again for quantised
        models, but its sums depend on the shape of the batch. Without it the logits of a float32 model differ by 1e-5
        and not by 1e-2 when a prompt is computed in other pieces.
        """
        # On a CPU the likeliest token is found sooner on the host: in the graph it cost 8 of 125 ms a step.
        first: Shape = GREEDY if model.offloaded else None
        self._shapes: list[Shape] = [first] * slots
        self._vocabulary = model.vocabulary.size
        self._samplers = [make_sampler(first, 0) for _ in range(slots)]
        self._aside: dict[int, Any] = {}
        self._configs = (llama_cpp.llama_sampler_seq_config * slots)()
        for slot, chain in enumerate(self._samplers if first is not None else ()):
            self._configs[slot].seq_id = slot
            self._configs[slot].sampler = ctypes.cast(chain, ctypes.c_void_p)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = cells
        params.n_batch = params.n_ubatch = batch
        # A slot asks for one output a step; room for an output of each token would cost a vocabulary of logits each.
        params.n_seq_max = slots + spare
        params.n_outputs_max = slots + spare + SCORED_OUTPUTS
        params.n_threads = params.n_threads_batch = threads
        # Cells of one buffer can belong to several sequences: a shared prefix costs no memory and no copy.
        params.kv_unified = True
        params.type_k = params.type_v = KV_TYPES[kv_type]
        if exact or (model.is_float32 and not model.offloaded):
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        params.samplers = ctypes.cast(self._configs, ctypes.POINTER(llama_cpp.llama_sampler_seq_config))
        params.n_samplers = slots if first is not None else 0
        self._handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise ModelError(
                f"no memory for {cells:,} KV cells: {_complaint()}", hint="Give fewer --slots or a smaller --context."
            )
        self._memory = llama_cpp.llama_get_memory(self._handle)
        if not self._memory:
            self.close()
            raise ModelError("the model keeps no KV cache: it does not generate text", hint="Choose another model.")
        self.cells = int(llama_cpp.llama_n_ctx(self._handle))
        self._window = model.window
        #: ``on`` or ``off``, whatever was asked for: by the engine's own log.
        self.flash_attention = _flash_attention()
        self.batch = Batch(batch)

    # --- a step ------------------------------------------------------------------------------------------------------

    def decode(self) -> int:
        """Run the batch; 0, or NO_ROOM with nothing computed. Raises RuntimeError for anything else."""
        code = int(llama_cpp.llama_decode(self._handle, self.batch.struct()))
        if code not in (0, NO_ROOM):
            raise RuntimeError(f"llama_decode returned {code}: {_complaint()}")
        # A GPU works on while the call returns: its time belongs here, and the outputs are needed next anyway.
        llama_cpp.llama_synchronize(self._handle)
        return code

    def sampled(self, slot: int, index: int) -> int:
        """The token drawn for ``slot`` from the output at batch index ``index``; its value is now on the host."""
        token = int(llama_cpp.llama_get_sampled_token_ith(self._handle, index))
        if token != llama_cpp.LLAMA_TOKEN_NULL:
            return token
        # The chain could not run in the graph.
        return int(llama_cpp.llama_sampler_sample(self._samplers[slot], self._handle, index))

    def drawn_aside(self, slot: int, index: int) -> int:
        """The token that the slot's sampler beside the graph draws from the output at batch index ``index``."""
        return int(llama_cpp.llama_sampler_sample(self._aside[slot], self._handle, index))

    def logits(self, index: int) -> NDArray[np.float32]:
        """The logits of the output at batch index ``index``, of a slot of shape None. Valid until the next decode."""
        pointer = llama_cpp.llama_get_logits_ith(self._handle, index)
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))

    def warm_up(self) -> None:
        """One small pass, so that a machine that cannot run this model says so now, and no request waits for it."""
        self.batch.clear()
        self.batch.put(0, 0, np.zeros(min(32, self.batch.size), dtype=np.int32), wanted=1)
        self.decode()
        self.drop(0)

    # --- sequences ---------------------------------------------------------------------------------------------------

    def shape(self, slot: int) -> Shape:
        """How the slot's sampler draws."""
        return self._shapes[slot]

    def set_sampling(self, slot: int, shape: Shape, seed: int) -> None:
        """Prepare the slot's sampler for a new request.

        A new shape makes llama.cpp plan its graph again, which takes tens of milliseconds; a new seed does not.
        """
        if shape == self._shapes[slot] and shape in (None, GREEDY):
            return
        fresh = make_sampler(shape, seed)
        if shape == self._shapes[slot]:
            llama_cpp.llama_sampler_copy(fresh, self._samplers[slot])
            llama_cpp.llama_sampler_free(fresh)
            return
        # A False only says that the chain does not run inside the graph; sampling on the host gives the same.
        llama_cpp.llama_set_sampler(self._handle, slot, fresh)
        if self._samplers[slot] is not None:
            llama_cpp.llama_sampler_free(self._samplers[slot])
        self._samplers[slot], self._shapes[slot] = fresh, shape

    def set_aside(self, slot: int, shape: Shape, seed: int) -> None:
        """Prepare a sampler that draws what one in the graph would, for a slot whose logits come to the host."""
        if slot in self._aside:
            llama_cpp.llama_sampler_free(self._aside[slot])
        self._aside[slot] = make_sampler(shape, seed)

    def drop(self, sequence: int) -> None:
        """Forget a sequence; its cells are free when no other sequence shares them."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def can_share(self, source: int, length: int) -> bool:
        """Whether what follows the first ``length`` tokens of ``source`` finds all the cells that it looks back on.

        Cells that have left the sliding window of ``source`` are given to others, those of its start first.
        """
        if not self._window or length > int(llama_cpp.llama_memory_seq_pos_max(self._memory, source)):
            return True  # The whole of a sequence has what its own next token would look back on.
        first = int(llama_cpp.llama_memory_seq_pos_min(self._memory, source))
        return first <= max(0, length - self._window)

    def share(self, source: int, target: int, length: int) -> None:
        """Let ``target`` begin with the first ``length`` cells of ``source``; see :meth:`can_share`."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def close(self) -> None:
        if self._handle:
            llama_cpp.llama_free(self._handle)
            self._handle = None
            for chain in (*self._samplers, *self._aside.values()):
                if chain is not None:
                    llama_cpp.llama_sampler_free(chain)
