"""Reconstruction: after the gists and a marker, the model also says the examples again, word for word.

A prefix from which the examples can be read off has lost nothing (In-context Autoencoder, Ge et al. 2023).
RESULTS.md, "What helps": by itself it brings nothing here, since what a prefix has to keep is the task.
"""

from torch import Tensor
from torch.nn.functional import cross_entropy

from data import Batch, Sample, Term, collate
from llama import InputError
from run import compression_of, option

OPTIONS = {
    "reconstruct": option(0.0, help="weight of the loss of saying the examples again, after their gists")
}


def check(args) -> None:
    if args.method != "hyper" or args.task == "prefix":
        raise InputError("--reconstruct belongs to a hypernetwork that is trained to compress")
    if compression_of(args).parts > 1:
        raise InputError("--reconstruct goes with one set of examples")


def terms(run, terms: list[Term]) -> list[Term]:
    if not run.args.reconstruct:
        return terms
    V = run.hyper.model.config.vocab
    marker = run.formatter.tokenizer.eos

    def loss(hyper, batch: Batch, gists, logits) -> Tensor:
        again = reconstruction(batch, V, marker)
        return cross_entropy(hyper.predict(again, gists).float(), again.targets, reduction="sum")

    def count(batch: Batch) -> int:
        return len(reconstruction(batch, V, marker).targets)

    return [*terms, Term(run.args.reconstruct, count, loss, "reconstruct")]


def reconstruction(batch: Batch, V: int, marker: int) -> Batch:
    """A query for each context: the marker, and the context's own words as the target."""
    (rows,) = batch.context
    samples = []
    for tokens, last in zip(rows.tokens.tolist(), rows.kept.amax(1).tolist()):
        words = [token for token in tokens[1 : last + 1] if token < V]  # padding follows what is kept
        samples.append(Sample(None, [([marker], words)]))
    return collate(samples).to(rows.tokens.device)
