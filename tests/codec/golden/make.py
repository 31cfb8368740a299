"""Makes the golden files: one message per codec and form, of one small adapter. Run from the repository's root:

    python -m tests.codec.golden.make

Commit what it writes only for a new codec or a new version; a released file is never written again.
"""

import hashlib
import json
from pathlib import Path

import torch

from fedfstq_hf.codec import CodecContext, Schema, codec_names, get_codec, message
from fedfstq_hf.federation import keys

FOLDER = Path(__file__).parent / "v1"
KEYS, FEDERATION = keys.KeyPair(bytes(range(32))), "golden"
SHAPES = {"0.q.lora_A": (4, 24), "0.q.lora_B": (20, 4), "0.v.magnitude": (12,), "1.v.lora_A": (40, 48)}
# further forms of a codec, by the name of their file
FORMS = {
    "fp32-signed": ("fp32", {}),
    "fstq-all": ("fstq", {"bits": 1.0, "fisher_weighted": False}),
    "fstq-blind": ("fstq", {"fisher_weighted": False}),
    "paper-all": ("paper", {"shares": [0.5, 0.3, 0.2]}),
    "qsgd-2": ("qsgd", {"bits": 2, "bucket": 64, "norm": "l2"}),
    "sparseloco-coded": ("sparseloco", {"entropy_coded": True}),
    "sparseloco-stored": ("sparseloco", {"packed": False}),
    "topk-16": ("topk", {"value_bits": 16}),
    "topk-4": ("topk", {"value_bits": 4}),
}


def make_update():
    """(delta, fisher) out of exactly rounded operations only: the same on every machine."""
    state, numbers = 1, []
    for _ in range(2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())):
        state = state * 6364136223846793005 + 1442695040888963407 & 2**64 - 1
        # products of two uniforms, so that some coordinates matter more than others
        numbers.append((((state >> 40) - 2**23) / 2**23) * ((state >> 20 & 0xFFFFF) / 2**20))
    vector = torch.tensor(numbers, dtype=torch.float64).float()
    schema = Schema.from_state_dict({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    return schema.unflatten(vector[::2].contiguous() / 64), schema.unflatten(vector[1::2].square())


SCHEMA = Schema.from_state_dict(make_update()[0])


def messages():
    """All golden messages by file name, but for the sealed one, whose bytes are random."""
    delta, fisher = make_update()
    made = {}
    for stem, (name, options) in {**{n.replace("-", "_"): (n, {}) for n in codec_names()}, **FORMS}.items():
        payload = get_codec(name, **options).encode(delta, fisher, context=CodecContext(round=3)).payload
        header = message.Header(3, "golden-client", 10, "5a" * 32, SCHEMA.fingerprint, name)
        sign = keys.signer(KEYS, FEDERATION) if stem == "fp32-signed" else None
        made[stem] = message.pack(header, payload, sign=sign)
    return made


def expected():
    """sha256 of what each file decodes to, dense float32."""
    return json.loads((FOLDER / "decoded.json").read_text())


def main():
    """Write the files that are missing or different."""
    FOLDER.mkdir(exist_ok=True)
    decoded = {}
    for stem, data in messages().items():
        (FOLDER / f"{stem}.safetensors").write_bytes(data)
        header, payload = message.unpack(data)
        dense = get_codec(header.codec).decode(payload, SCHEMA).to_dense()
        decoded[stem] = hashlib.sha256(dense.numpy().astype("<f4").tobytes()).hexdigest()
    (FOLDER / "decoded.json").write_text(json.dumps(decoded, indent=1, sort_keys=True) + "\n")
    sealed = FOLDER / "sealed.bin"
    signed = messages()["fp32-signed"]
    if not sealed.exists() or keys.unseal(KEYS, sealed.read_bytes()) != signed:
        sealed.write_bytes(keys.seal(KEYS.seal_key, signed))


if __name__ == "__main__":
    main()
