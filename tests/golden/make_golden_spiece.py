"""Makes spiece.npz: a small SentencePiece model of umT5's kind, texts, and the ids that the library makes of them.

pip install sentencepiece && python tests/golden/make_golden_spiece.py
"""

import io
from pathlib import Path

import numpy as np
import sentencepiece

WORDS = "a red ball rolls over the green hill while two small kites rise into the evening sky above an old stone wall"
TEXTS = (
    "a red ball",
    "The red Ball  rolls, over 12 hills!",
    "",
    "kites … über the wall 天空",
    "ＦＵＬＬ width and ﬁne",
    "<pad> is no word",
)


def main() -> None:
    """Train, encode, write."""
    words = WORDS.split()
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(words, 8)) for _ in range(400)]
    rules = Path(__file__).with_name("rules.tsv")
    rules.write_text("".join(f"{0xFF21 + i:X}\t{0x41 + i:X}\n" for i in range(26)) + "FB01\t66 69\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=340, model_type="unigram", byte_fallback=True,
        normalization_rule_tsv=str(rules), pad_id=0, eos_id=1, bos_id=2, unk_id=3, character_coverage=1.0,
        hard_vocab_limit=False, num_threads=1,
    )  # fmt: skip
    rules.unlink()
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = [np.array([*library.encode(text), library.eos_id()], np.int32) for text in TEXTS]
    arrays = {f"ids{i}": x for i, x in enumerate(ids)}
    target = Path(__file__).with_name("spiece.npz")
    np.savez_compressed(target, model=np.frombuffer(model.getvalue(), np.uint8), texts=np.array(TEXTS), **arrays)
    print(target, len(model.getvalue()), [x.tolist() for x in ids])


if __name__ == "__main__":
    main()
