"""What the full context says, as a teacher: two terms of the loss.

    --distill W           W × the Kullback-Leibler divergence from the base's answer with all examples in
                          context (the second-best ingredient in an ablation of HINT)
    --weight-by-context   a target counts by what the full context is worth for it, in nats ("token
                          importance", arXiv 2412.17483)

RESULTS.md, "What helps": distillation brings nothing here, not even from the base, whose answers with the
examples in context are far better than its pupil's.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch, Term
from gist import keep_all, read_contexts
from llama import InputError
from run import option

OPTIONS = {
    "distill": option(
        0.0, help="weight of how far answers after gists are from the base's with all examples in context"
    ),
    "weight_by_context": option(
        False, help="weight each target token by how much the full context lowers its loss"
    ),
}
LEAST_WORTH = 0.1  # a target's weight where the context is worth nothing for it, in nats


def check(args) -> None:
    if args.method != "hyper" or args.task == "prefix":
        raise InputError(
            "--distill and --weight-by-context belong to a hypernetwork that is trained to compress"
        )
    if args.task == "hyperpretrain" and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("--distill and --weight-by-context need a single process where the model is sharded")


def terms(run, terms: list[Term]) -> list[Term]:
    args = run.args
    if args.weight_by_context:
        main, *others = terms
        terms = [main._replace(loss=weighted), *others]
    if args.distill:
        terms = [*terms, Term(args.distill, lambda batch: len(batch.targets), divergence, "distill")]
    return terms


def weighted(hyper, batch: Batch, gists, logits: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
    return (context_gain(hyper, batch) * losses).sum()


def divergence(hyper, batch: Batch, gists, logits: Tensor) -> Tensor:
    student = logits.float().log_softmax(-1)
    teacher = teacher_logits(hyper, batch).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


@torch.no_grad()
def context_gain(hyper, batch: Batch) -> Tensor:
    """By how many nats the full context lowers the loss of each target; at least LEAST_WORTH. [M]"""
    alone = F.cross_entropy(
        hyper.model(batch.tokens, select=batch.select)[0].float(), batch.targets, reduction="none"
    )
    taught = F.cross_entropy(teacher_logits(hyper, batch), batch.targets, reduction="none")
    return (alone - taught).clamp(min=LEAST_WORTH)


@torch.no_grad()
def teacher_logits(hyper, batch: Batch) -> Tensor:
    """What the bare base predicts at the targets with all examples in context. [M, V]"""
    V = hyper.model.config.vocab
    contexts = [[] for _ in batch.context[0].tokens]
    for rows in batch.context:
        for context, tokens, last in zip(contexts, rows.tokens.tolist(), rows.kept.amax(1).tolist()):
            tokens = tokens[bool(context) : last + 1]  # padding follows what is kept; one BOS is enough
            context += [token for token in tokens if token < V]
    T = batch.tokens.shape[1]
    # The examples have a BOS, so a query has none, as in the few-shot column (text has nothing else).
    bos = int((batch.select % T).min() > 0)
    before = read_contexts(hyper.model, [keep_all(tokens) for tokens in contexts])
    past = before[batch.row].as_past(T - bos)
    select = batch.select - bos * (batch.select // T + 1)  # the same places in [N, T - bos]
    return hyper.model(batch.tokens[:, bos:], **past, select=select)[0].float()
