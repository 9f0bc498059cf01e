"""Small traces made without a model, whose hidden states say which experts are chosen."""

from pathlib import Path

import numpy as np

from layerscope_jax import Model
from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.prediction.traces import Passage, Trace, TraceHeader, TraceWriter
from predictor.llapor import LLaPor
from predictor.network import GroupConfig
from predictor.pca import Basis
from predictor.routers import Routers
from predictor.step import first_params, stacks

LAYERS, WIDTH, EXPERTS, CHOICES = 4, 8, 8, 2
MODEL = ModelIdentity(
    family="synthetic",
    num_layers=LAYERS,
    hidden_size=WIDTH,
    num_experts=EXPERTS,
    experts_per_token=CHOICES,
    routers="0123456789abcdef",
)
SMALL = {name: GroupConfig(width=16, blocks=1, learning_rate=1e-2) for name in ("input", "middle", "output")}


def write_trace(
    folder: Path,
    *,
    documents: int = 24,
    heldout: int = 6,
    tokens: int = 16,
    prompt: int = 8,
    shuffled: tuple[int, ...] = (),
    hidden: bool = True,
    model: ModelIdentity = MODEL,
    seed: int = 0,
) -> Trace:
    """Two domains of documents, one passage each: "verse", of which `heldout` are kept out, and "letters",
    `heldout` of them, all kept out.

    Every layer turns the hidden state a little and reads it with a router of its own. The first experts are
    preferred, so that popularity is worth something.

    Args:
        shuffled: layers whose experts are exchanged between rows: nothing says any more who chose them.
    """
    rng = np.random.default_rng(seed)
    passages = [
        Passage("verse", f"verse/{index}", "heldout" if index < heldout else "train", 0, prompt, tokens)
        for index in range(documents)
    ]
    passages += [Passage("letters", f"letters/{i}", "heldout", 0, prompt, tokens) for i in range(heldout)]
    rows = tokens * len(passages)
    weight = rng.standard_normal((LAYERS, WIDTH, EXPERTS)).astype(np.float32)
    turn = [np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0] for _ in range(LAYERS)]
    states = [rng.standard_normal((rows, WIDTH))]
    for layer in range(1, LAYERS):
        states.append(0.9 * states[-1] + 0.4 * states[-1] @ turn[layer])
    states = np.stack(states, 1).astype(np.float32)  # [N, L, D]
    logits = np.einsum("nld,lde->nle", states, weight) - np.linspace(0, 2, EXPERTS)
    experts = np.argsort(-logits, -1)[..., :CHOICES]
    for layer in shuffled:
        experts[:, layer] = experts[rng.permutation(rows), layer]
    chosen = np.exp(np.take_along_axis(logits, experts, -1))
    arrays = {
        "tokens": np.arange(rows),
        "experts": experts,
        "weights": chosen / chosen.sum(-1, keepdims=True),
    }
    if hidden:
        arrays["hidden"] = states - states.mean(0)
    header = TraceHeader(
        model=model, hidden=WIDTH if hidden else 0, settings={"heldout_domains": ["letters"]}
    )
    writer = TraceWriter(folder, header)
    order = np.arange(len(passages)).reshape(2, -1)  # two chunks
    for part in order:
        here = slice(part[0] * tokens, (part[-1] + 1) * tokens)
        writer.write(
            [passages[index] for index in part], {name: array[here] for name, array in arrays.items()}
        )
    writer.finish()
    basis(states).save(folder)
    Routers(weight.swapaxes(1, 2), np.ones((LAYERS, WIDTH), np.float32)).save(folder)
    return Trace.open(folder)


def basis(states: np.ndarray) -> Basis:
    """That only takes the mean from the hidden states [N, L, D]."""
    return Basis(
        mean=states.mean(0),
        components=np.broadcast_to(np.eye(WIDTH, dtype=np.float32), (LAYERS, WIDTH, WIDTH)).copy(),
        variance=states.var(0).astype(np.float32),
    )


def untrained(trace: Trace, look_ahead: int = 2, seed: int = 0) -> LLaPor:
    """A predictor as training begins with it."""
    found = stacks(trace.header.model, WIDTH, look_ahead, SMALL)
    params = first_params(trace.header.model, found, look_ahead, seed)
    return LLaPor(trace.header.model, look_ahead, Basis.load(trace.folder), found, params)


def llapor_of(model: Model) -> LLaPor:
    """An untrained predictor of a model, whose PCA leaves hidden states as they are."""
    identity = ModelIdentity.of(model)
    layers, width = identity.num_layers, identity.hidden_size
    eye = np.broadcast_to(np.eye(width, dtype=np.float32), (layers, width, width)).copy()
    basis = Basis(np.zeros((layers, width), np.float32), eye, np.ones((layers, width), np.float32))
    found = stacks(identity, width, 2, SMALL)
    return LLaPor(identity, 2, basis, found, first_params(identity, found, 2, 0))
