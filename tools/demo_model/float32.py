"""Copy a GGUF file with its weights widened to float32.

    python tools/demo_model/float32.py workers/promptmill_workers/demo_model/demo.gguf /tmp/demo-f32.gguf

In float32 the order of sums in a batch changes no token of a greedy answer, so batched and single answers can be
compared exactly. Needs gguf and numpy alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np

#: Fields that a writer sets by itself.
OWN_FIELDS = {"general.architecture", "general.file_type", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}


def write_float32(source: Path, target: Path) -> None:
    """Write ``target``: the fields of ``source`` and its F16 or F32 tensors, all as F32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, field in reader.fields.items():
        if name not in OWN_FIELDS:
            writer.add_key_value(name, field.contents(), field.types[0], _inner_type(field))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(tensor.data, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _inner_type(field: Any) -> gguf.GGUFValueType | None:
    """Type of the elements of a field that is an array."""
    return field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    write_float32(args.source, args.target)


if __name__ == "__main__":
    main()
