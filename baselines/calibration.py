"""A text to measure a model's queries on, and a file cache of measurements."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buzz.kernels.cpu import user_cache

FORMAT = 1  # to be raised with every change of what is measured
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number

TEXT = """\
The hive stood at the edge of an orchard, where the wind came over the wall and the rain did not.
In April its keeper lifted the lid for the first time since October, and counted the frames that
were covered with bees: five on one side, two on the other, and between them a patch of brood no
larger than a hand. "They are late this year," she said, "but they are not few. Give them syrup,
and leave them alone for a week." Her son wrote it down, with the date and the weather.

How does a colony decide where to live? When a swarm has left its old home, it hangs in a tree for
some hours or some days, and a few hundred scouts look at holes in the neighbourhood. A scout that
has found a good one comes back and dances: the longer and the livelier, the better she thinks it
is. Others follow her, look for themselves, and dance in turn. Dances for poor places end sooner.
So the better place gains followers, although no bee has seen both, and once about fifteen scouts
meet at one entrance, the search is over and the whole swarm takes wing. Three conditions make this
work: every scout judges for herself, she reports what she saw and not what others say, and her
enthusiasm fades with time. A committee could do worse.

Notes for the spring inspection:
1. Weigh the hive. Less than 15 kg means that stores are low.
2. Look for eggs; where there are some, the queen was there within three days.
3. Replace the two oldest frames.
4. Count mites on the board: 0 to 3 a day is fine, 10 or more is not.

def frames_needed(bees: int, per_frame: int = 2000) -> int:
    \"\"\"Frames that so many bees cover, at least one.\"\"\"
    if bees < 0:
        raise ValueError(f"a hive cannot hold {bees} bees")
    return max(1, -(-bees // per_frame))

print([frames_needed(count) for count in (0, 1_500, 12_000, 41_000)])  # [1, 1, 6, 21]

Dear Mr. Lindqvist, thank you for your letter of 3 May. We are sorry to hear that the parcel was
damaged on its way. Please keep the jars that are whole; for the other four we have sent you the
price, 38.40 in all, which should reach your account by Friday. If it does not, call us between nine
and five. Kind regards, the shop.

Question: A jar holds 450 g of honey, and a good year yields 27 kg. How many jars are filled, and
what do they bring at 9.60 each? Answer: 27 kg are 27,000 g, and 27,000 / 450 = 60, so sixty jars
are filled. They bring 60 * 9.60 = 576. If six of them are given away, 54 are left, and those bring
518.40.

In the evening the boy read his notes aloud, and his mother corrected two numbers. The first was
the weight, which he had written without the lid; the second was the count of mites. Then they shut
the book, because it had grown dark, and went to look whether the bees had taken the syrup.
"""


def stored(model: Any, ids: Sequence[int], measure: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The result of `measure`, from the user's cache directory if it is there already.

    A file that is missing or torn is measured again. If the directory cannot be written, or the
    weights cannot be hashed (offloaded or quantised ones), every process measures.

    Args:
        ids: token ids of the text that the model is measured on.
    """
    weights = model.state_dict() | dict(model.named_buffers())
    if not all(isinstance(one, Tensor) and not one.is_meta for one in weights.values()):
        return measure()
    try:
        file = user_cache() / f"queries-{_digest(model, weights, ids)}.pt"
    except RuntimeError:  # there is no home directory, or a weight cannot be read as integers
        return measure()
    try:
        content = file.read_bytes()
    except OSError:
        content = b""
    checksum, body = content[:32], content[32:]
    if checksum == hashlib.sha256(body).digest():
        return torch.load(io.BytesIO(body), map_location=model.device, weights_only=True)
    found = measure()
    written = io.BytesIO()
    torch.save([tensor.cpu() for tensor in found], written)
    body = written.getvalue()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            part = Path(folder) / file.name
            part.write_bytes(hashlib.sha256(body).digest() + body)
            part.replace(file)  # at once, so that no other process reads half of it
    except OSError:
        pass
    return found


def _digest(model: Any, weights: dict[str, Tensor], ids: Sequence[int]) -> str:
    """A hash of all that the result depends on: weights, configuration, text, device, versions."""
    config = model.config.to_json_string(use_diff=False)
    versions = FORMAT, torch.__version__, version("transformers")
    computes = model.device.type, model.config._attn_implementation
    found = hashlib.sha256(repr((versions, computes, config, tuple(ids))).encode())
    for name, weight in weights.items():
        found.update(repr((name, weight.dtype, tuple(weight.shape))).encode())
        bits = weight.detach().view(INTEGERS[weight.element_size()])
        # Of matrices the sums of rows and columns as integers: exact on every device, and much less
        # to hash than the weights.
        for part in (bits,) if bits.dim() < 2 else (bits.sum(-1), bits.sum(0)):
            found.update(part.cpu().numpy().tobytes())
    return found.hexdigest()[:16]
